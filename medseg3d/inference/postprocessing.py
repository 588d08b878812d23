"""What is done to a label map after the network. Arrays are (D, H, W)."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from scipy import ndimage

_TOUCHING = np.ones((3, 3, 3), bool)  # voxels that share a face, an edge or a corner belong together


def drop_small_components(labels: np.ndarray, min_share: float) -> np.ndarray:
    """A copy of a label map without the pieces of each label that are small beside its largest one.

    Args:
        labels: (D, H, W), whole numbers; 0 is the background, which a dropped piece becomes.
        min_share: a piece stays if it has at least this share of the largest piece's voxels; 1 keeps the largest
            (and any as large), 0 keeps all.

    Raises:
        ValueError: ``min_share`` is not in [0, 1].
    """
    if not 0 <= min_share <= 1:
        raise ValueError(f"min_share must lie in [0, 1], got {min_share}")
    result = np.array(labels)
    for number, box in enumerate(ndimage.find_objects(result), start=1):
        if box is None:
            continue
        pieces, count = ndimage.label(result[box] == number, structure=_TOUCHING)
        if count < 2:
            continue
        sizes = np.bincount(pieces.ravel())
        sizes[0] = 0
        small = sizes < min_share * sizes.max()
        small[0] = False
        result[box][small[pieces]] = 0
    return result


class DropSmallComponentsd(MapTransform):
    """:func:`drop_small_components` for label maps (1, D, H, W) in a bundle's post-processing.

    Args:
        keys: label maps.
        min_share: see :func:`drop_small_components`.
    """

    def __init__(self, keys: KeysCollection, min_share: float = 1.0, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        if not 0 <= min_share <= 1:
            raise ValueError(f"min_share must lie in [0, 1], got {min_share}")
        self.min_share = min_share

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        output = dict(data)
        for key in self.key_iterator(output):
            label_map = output[key]
            cleaned = torch.from_numpy(drop_small_components(label_map.detach().cpu().numpy()[0], self.min_share)[None])
            is_meta = isinstance(label_map, MetaTensor)
            output[key] = MetaTensor(cleaned).copy_meta_from(label_map) if is_meta else cleaned
        return output

"""Two-dimensional pictures for training and inference: MONAI dictionary transforms around ``medseg3d.io.raster``.

Arrays are (channels, rows, columns). MONAI's own reader turns rows into columns, which these do not.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import ensure_tuple

from medseg3d.io.raster import read_image, read_label_image
from medseg3d.tasks import mask_boxes


class LoadPictured(MapTransform):
    """Paths of pictures become float32 (3, rows, columns), grey ones alike in all; labels int32 (1, rows, columns).

    The path stays in the picture's metadata, as ``filename_or_obj``.

    Args:
        keys: paths of PNG, JPEG, TIFF or BMP files.
        label_keys: those of ``keys`` that hold a number for each pixel.
    """

    def __init__(self, keys: KeysCollection, label_keys: KeysCollection = ()) -> None:
        super().__init__(keys)
        self.label_keys = ensure_tuple(label_keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            path = Path(result[key])
            if key in self.label_keys:
                labels = torch.from_numpy(read_label_image(path).astype(np.int32)[None])
                result[key] = MetaTensor(labels, meta={"filename_or_obj": str(path)})
            else:
                result[key] = as_loaded(read_image(path), path)
        return result


def as_loaded(image: np.ndarray, path: str | Path = "picture") -> MetaTensor:
    """Pixels (rows, columns) or (rows, columns, 3) as `LoadPictured` leaves them."""
    channels = np.broadcast_to(image, (3, *image.shape)) if image.ndim == 2 else np.moveaxis(image, -1, 0)
    array = np.ascontiguousarray(channels, dtype=np.float32)
    return MetaTensor(torch.from_numpy(array), meta={"filename_or_obj": str(path)})


class StretchContrastd(MapTransform):
    """The picture's darkest and brightest values become 0 and 1, what lies beyond is cut off.

    Microscopes differ in exposure and files in depth: each picture is measured by its own percentiles, all channels
    together so that colours stay. A picture of one value becomes 0.

    Args:
        keys: pictures.
        lower, upper: percentiles, 0 to 100.

    Raises:
        ValueError: they are not in order.
    """

    def __init__(self, keys: KeysCollection, lower: float = 1.0, upper: float = 99.8) -> None:
        super().__init__(keys)
        if not 0 <= lower < upper <= 100:
            raise ValueError(f"percentiles must be 0 <= lower < upper <= 100, got {lower} and {upper}")
        self.lower, self.upper = lower, upper

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            low, high = np.percentile(np.asarray(result[key]), (self.lower, self.upper))
            result[key] = ((result[key] - low) / max(high - low, 1e-6)).clip(0, 1)
        return result


class ObjectTargetsd(MapTransform):
    """From numbered objects (1, rows, columns): what a detector learns, beside them in the dictionary.

    "boxes", float32 (N, 4) as (x0, y0, x1, y1) with the far edges outside; "labels", int64 (N,), all 1; "masks", uint8
    (N, rows, columns).

    Args:
        keys: numbered objects, 0 for the background.
        least: pixels of the smallest object that is learnt: crops leave slivers.
    """

    def __init__(self, keys: KeysCollection, least: int = 1) -> None:
        super().__init__(keys)
        self.least = least

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            objects = np.asarray(result[key])[0].astype(np.int64)
            numbers, counts = np.unique(objects[objects > 0], return_counts=True)
            numbers = numbers[counts >= self.least]
            masks = objects == numbers[:, None, None]
            result["boxes"] = torch.from_numpy(mask_boxes(masks, inclusive=False).astype(np.float32))
            result["labels"] = torch.ones(len(numbers), dtype=torch.int64)
            result["masks"] = torch.from_numpy(masks.astype(np.uint8))
        return result

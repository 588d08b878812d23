"""Pictures of nuclei in more than the colours that were photographed, and each kind of picture as often as the others.

Arrays are (channels, rows, columns).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, RandomizableTransform

from medseg3d.io.raster import read_image, read_label_image


class RandColoursd(RandomizableTransform, MapTransform):
    """Other stains, filters and polarities: colours of a picture (3, rows, columns), 0 to 1, under a random affine map.

    Each of four steps is taken or not, independently. What is dark becomes bright, and the reverse; the channels change
    places; all three become one mixture of them, which is grey; and each channel gets a range of its own within 0 to 1,
    as a stain or a filter would give it. Grey pictures are tinted by the last alone.

    Args:
        keys: pictures, which get the same map.
        invert, permute, grey, tint: probability of each step.
        least_range: of a tinted channel, 0 to 1.

    Raises:
        ValueError: a picture without three channels, or a range outside 0 to 1.
    """

    def __init__(
        self,
        keys: KeysCollection,
        invert: float = 0.25,
        permute: float = 0.25,
        grey: float = 0.25,
        tint: float = 0.5,
        least_range: float = 0.3,
    ) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob=1.0)
        if not 0 <= least_range <= 1:
            raise ValueError(f"least_range is a part of the range from 0 to 1, got {least_range}")
        self.invert, self.permute, self.grey, self.tint = invert, permute, grey, tint
        self.least_range = least_range

    def randomize(self, data: Any = None) -> None:
        """Draw ``matrix`` (3, 3) and ``offset`` (3,) of the map; they keep 0 to 1 within 0 to 1."""
        self.matrix, self.offset = np.eye(3), np.zeros(3)
        if self.R.random() < self.permute:
            self.matrix = self.matrix[self.R.permutation(3)]
        if self.R.random() < self.grey:
            self.matrix = np.tile(self.R.dirichlet(np.ones(3)), (3, 1))
        if self.R.random() < self.invert:
            self.matrix, self.offset = -self.matrix, np.ones(3)
        if self.R.random() < self.tint:
            spans = self.R.uniform(self.least_range, 1, 3)
            lowest = self.R.uniform(0, 1 - spans)
            self.matrix, self.offset = spans[:, None] * self.matrix, spans * self.offset + lowest

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        self.randomize()
        for key in self.key_iterator(result):
            image = torch.as_tensor(result[key])
            if len(image) != 3:
                raise ValueError(f"a picture must have three channels, red, green and blue; got {tuple(image.shape)}")
            matrix, offset = (
                torch.as_tensor(part, dtype=image.dtype, device=image.device) for part in (self.matrix, self.offset)
            )
            result[key] = torch.tensordot(matrix, image, dims=1) + offset[:, None, None]
        return result


def kind_of_picture(case: Mapping[str, Any], large: float = 32.0) -> str:
    """What a network must learn from a picture: "stained" if it is in colours, else "large nuclei" or "small nuclei".

    Args:
        case: paths of the picture, ``"image"``, and of its numbered objects, ``"label"``.
        large: pixels of diameter from which the median object is large: that of a disc of the same area.
    """
    image, objects = read_image(case["image"]), read_label_image(case["label"])
    if image.ndim == 3 and (image != image[..., :1]).any():
        return "stained"
    areas = np.bincount(objects.ravel())[1:]
    present = areas[areas > 0]
    return "large nuclei" if present.size and np.median(present) >= np.pi * (large / 2) ** 2 else "small nuclei"


def even_weights(kinds: Sequence[Hashable]) -> list[float]:
    """Weights for sampling, one a case, that sum to 1: every kind comes up equally often."""
    counts = Counter(kinds)
    return [1 / (len(counts) * counts[kind]) for kind in kinds]

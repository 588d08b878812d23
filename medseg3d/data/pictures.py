"""Two-dimensional pictures for training and inference: MONAI dictionary transforms around ``medseg3d.io.raster``.

Arrays are (channels, rows, columns). MONAI's own reader turns rows into columns, which these do not.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import pairwise
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

UNKNOWN = 255  # the semantic class of pixels that nobody has named


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


class PanopticTargetsd(MapTransform):
    """From numbered objects (1, rows, columns) of one class: what ``UPSNet`` learns, beside them in the dictionary.

    "boxes", "labels" and "masks" as `ObjectTargetsd` gives them, but boxes end with their last pixels (Detectron's
    convention), and "semantic", int64 (rows, columns): what lies between the objects is one class of stuff, chosen
    by how bright it is, 0 up to the first of ``bounds``, 1 above it and so on; objects have the class after them,
    ``len(bounds) + 1``; those that are too small to be learnt are 255, unknown. How bright: the median over the pixels
    between the objects of the mean of the channels. In fluorescence that is dark ground, in stained tissue the tissue.

    Args:
        keys: numbered objects, 0 for what lies between.
        image_key: the picture (channels, rows, columns).
        bounds: between the classes of stuff, ascending, in the unit of the picture.
        least: pixels of the smallest object that is learnt.

    Raises:
        ValueError: bounds that do not ascend.
    """

    def __init__(
        self, keys: KeysCollection, image_key: str = "image", bounds: Sequence[float] = (0.4,), least: int = 1
    ) -> None:
        super().__init__(keys)
        if any(low >= high for low, high in pairwise(bounds)):
            raise ValueError(f"bounds between classes of stuff must ascend, got {tuple(bounds)}")
        self.image_key, self.bounds = image_key, tuple(bounds)
        self.objects = ObjectTargetsd(keys, least)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = self.objects(data)
        for key in self.key_iterator(result):
            between = np.asarray(result[key])[0] == 0
            grey = np.asarray(result[self.image_key]).mean(axis=0)[between]
            stuff = int(np.searchsorted(self.bounds, np.median(grey))) if grey.size else 0
            learnt = np.asarray(result["masks"]).any(axis=0)
            semantic = np.where(between, stuff, np.where(learnt, len(self.bounds) + 1, UNKNOWN))
            result["semantic"] = torch.from_numpy(semantic.astype(np.int64))
            result["boxes"] = result["boxes"] - torch.tensor([0.0, 0.0, 1.0, 1.0])
        return result

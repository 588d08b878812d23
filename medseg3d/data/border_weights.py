"""Weights of voxels that teach a network the thin borders between touching objects.

Ronneberger et al., "U-Net", MICCAI 2015, section 3, equation 2: w(x) = w_c(x) + w0 exp(-(d1 + d2)^2 / (2 sigma^2)) with
the distances d1 and d2 to the nearest and the second nearest object. Any number of spatial axes.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from monai.config import KeysCollection
from monai.transforms import MapTransform
from scipy import ndimage

NEGLIGIBLE = 1e-8  # of w0: weights below it are 0


def border_weights(
    objects: np.ndarray, w0: float = 10.0, sigma: float = 5.0, spacing: Sequence[float] | None = None
) -> np.ndarray:
    """The second term of equation 2, float32, of the shape of ``objects``; 0 where there are fewer than two objects.

    Args:
        objects: integers, 0 for the background, another number for each object.
        w0: the weight where two objects touch.
        sigma: distance over which it fades, in the unit of ``spacing``.
        spacing: size of a voxel along each axis; 1 where it is not given.

    Raises:
        ValueError: objects that are no integers, or a w0 or sigma that is not positive.
    """
    if not np.issubdtype(objects.dtype, np.integer):
        raise ValueError(f"objects are numbered with integers, 0 for the background; got {objects.dtype}")
    if w0 <= 0 or sigma <= 0:
        raise ValueError(f"w0 and sigma must be positive, got {w0} and {sigma}")
    steps = np.ones(objects.ndim) if spacing is None else np.asarray(spacing, float)
    # Beyond this distance of a single object nothing is left of the weight, and the image need not be looked at.
    reach = sigma * np.sqrt(-2 * np.log(NEGLIGIBLE))
    margin = np.ceil(reach / steps).astype(int)
    nearest, second = (np.full(objects.shape, np.inf) for _ in range(2))
    for number, box in enumerate(ndimage.find_objects(objects), start=1):
        if box is None:
            continue
        around = tuple(
            slice(max(0, axis.start - more), axis.stop + more) for axis, more in zip(box, margin, strict=True)
        )
        distance = ndimage.distance_transform_edt(objects[around] != number, sampling=steps)
        first, other = nearest[around], second[around]
        np.minimum(other, np.maximum(first, distance), out=other)
        np.minimum(first, distance, out=first)
    return (w0 * np.exp(-((nearest + second) ** 2) / (2 * sigma**2))).astype(np.float32)


def balanced_weights(classes: np.ndarray, number: int = 2) -> np.ndarray:
    """The first term of equation 2, float32: each class weighs n / (K n_k), so that all weigh the same together.

    Args:
        classes: class of each voxel, 0 to ``number`` - 1.
        number: K; classes without a voxel have no weight to give.
    """
    counts = np.bincount(classes.ravel(), minlength=number)
    return (classes.size / (number * np.maximum(counts, 1)))[classes].astype(np.float32)


def part_touching(objects: np.ndarray) -> np.ndarray:
    """``objects`` with a background of one voxel's width, or two, between those that touch (section 3).

    A voxel with another object beside it, or diagonally so, becomes background.
    """
    full = np.ones((3,) * objects.ndim, bool)
    most = ndimage.maximum_filter(objects, footprint=full)
    hidden = np.where(objects == 0, np.iinfo(objects.dtype).max, objects)
    least = ndimage.minimum_filter(hidden, footprint=full)
    return np.where(most != least, 0, objects) * (objects != 0)


class BorderWeightsd(MapTransform):
    """From numbered objects (1, ...): foreground or background into their place, the weights of equation 2 beside it.

    Args:
        keys: objects.
        weights_key: where the weights go, float32 (1, ...).
        w0, sigma: as in ``border_weights``.
        balance: whether w_c balances foreground and background; else it is 1.
    """

    def __init__(
        self,
        keys: KeysCollection,
        weights_key: str = "weights",
        w0: float = 10.0,
        sigma: float = 5.0,
        balance: bool = True,
    ) -> None:
        super().__init__(keys)
        self.weights_key = weights_key
        self.w0, self.sigma, self.balance = w0, sigma, balance

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            objects = np.asarray(result[key])[0].astype(np.int32)
            classes = (part_touching(objects) > 0).astype(np.uint8)
            of_class = balanced_weights(classes) if self.balance else np.ones(classes.shape, np.float32)
            result[key] = classes[None]
            result[self.weights_key] = (of_class + border_weights(objects, self.w0, self.sigma))[None]
        return result

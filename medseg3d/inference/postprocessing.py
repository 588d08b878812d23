"""What is done to a label map after the network: small pieces are dropped and holes filled, of all labels in one pass.

Pieces are found by cc3d (connected-components-3d), which tells labels apart, so time does not grow with their number.
Arrays are (D, H, W) or (H, W).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from math import prod
from typing import Any, Literal

import cc3d
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

# Voxels that share a face, an edge or a corner belong together; what surrounds them is held together by faces only.
_TOUCHING: dict[int, Literal[8, 26]] = {2: 8, 3: 26}
_FACES: dict[int, Literal[4, 6]] = {2: 4, 3: 6}


def clean(
    labels: np.ndarray,
    spacing: Sequence[float],
    min_share: float = 0.0,
    min_volume_mm3: float = 0.0,
    fill_holes: bool = False,
) -> np.ndarray:
    """A copy of a label map without the small pieces of each label, whose holes are then filled.

    Args:
        labels: (D, H, W) or (H, W), whole numbers; 0 is the background, which a dropped piece becomes.
        spacing: mm between voxels along each axis.
        min_share: a piece stays if it has at least this share of its label's largest piece; 1 keeps the largest (and
            any as large), 0 keeps all.
        min_volume_mm3: a piece stays if it is at least this large (in mm2 for two axes), 0 keeps all.
        fill_holes: see :func:`fill_holes_of_labels`.

    Raises:
        ValueError: an argument out of its range, or labels that are not whole numbers in two or three axes.
    """
    _check_share(min_share)
    _check_volume(min_volume_mm3)
    if len(spacing) != np.ndim(labels) or not all(0 < mm < np.inf for mm in spacing):
        raise ValueError(f"spacing is a number above 0 mm for each of {np.ndim(labels)} axes, got {tuple(spacing)}")
    result = _drop(labels, min_share, min_volume_mm3 / prod(spacing))
    return fill_holes_of_labels(result) if fill_holes else result


def drop_small_components(labels: np.ndarray, min_share: float) -> np.ndarray:
    """A copy of a label map without the pieces of each label that are small beside its largest one.

    See :func:`clean` for the arguments and errors.
    """
    _check_share(min_share)
    return _drop(labels, min_share, 0)


def fill_holes_of_labels(labels: np.ndarray) -> np.ndarray:
    """A copy of a label map in which background that a label encloses has become that label.

    A hole is a piece of background, held together by faces, that does not reach the array's edge and of which all
    neighbours across faces have one label. No label is ever overwritten, and what two labels enclose together stays
    as it is.

    Raises:
        ValueError: labels that are not whole numbers in two or three axes.
    """
    result = _whole_numbers(labels).copy()
    pieces, count = cc3d.connected_components(result == 0, connectivity=_FACES[result.ndim], return_N=True)
    inner = np.ones(count + 1, bool)
    inner[0] = False
    for axis in range(result.ndim):
        for edge in (0, -1):
            inner[pieces.take(edge, axis=axis)] = False
    places = np.nonzero(inner[pieces])
    of_piece = pieces[places]
    lowest = np.full(count + 1, result.max(initial=0), result.dtype)
    highest = np.zeros(count + 1, result.dtype)
    for axis in range(result.ndim):
        for step in (-1, 1):  # never beyond the edge: inner pieces do not reach it
            beside = result[tuple(at + step if n == axis else at for n, at in enumerate(places))]
            around = beside != 0
            np.minimum.at(lowest, of_piece[around], beside[around])
            np.maximum.at(highest, of_piece[around], beside[around])
    result[places] = np.where(lowest == highest, highest, 0)[of_piece]
    return result.astype(np.asarray(labels).dtype, copy=False)


def _drop(labels: np.ndarray, min_share: float, min_voxels: float) -> np.ndarray:
    whole = _whole_numbers(labels)
    pieces, count = cc3d.connected_components(whole, connectivity=_TOUCHING[whole.ndim], return_N=True)
    sizes = cc3d.statistics(pieces, no_slice_conversion=True)["voxel_counts"]
    number = np.zeros(count + 1, np.int64)
    number[pieces] = whole
    largest = np.zeros(number.max() + 1, np.int64)
    np.maximum.at(largest, number, sizes)
    stays = (sizes >= min_share * largest[number]) & (sizes >= min_voxels * (1 - 1e-9))
    stays[0] = True
    return np.array(labels) if stays.all() else np.where(stays[pieces], labels, np.asarray(labels).dtype.type(0))


def _whole_numbers(labels: np.ndarray) -> np.ndarray:
    """The labels in a type that cc3d can tell apart."""
    array = np.asarray(labels)
    if array.ndim not in _FACES:
        raise ValueError(f"a label map has two or three axes, got shape {array.shape}")
    if array.dtype.kind == "f":  # as MONAI's AsDiscreted leaves them
        whole = array.astype(np.int32)
        if not np.array_equal(whole, array):
            raise ValueError("a label map holds whole numbers, got fractions: take the argmax or a threshold first")
        array = whole
    if array.dtype.kind == "b":
        array = array.view(np.uint8)
    if array.dtype.kind not in "ui" or array.min(initial=0) < 0:
        raise ValueError(f"a label map holds whole numbers of at least 0, got {array.dtype} from {array.min()}")
    return array


def _check_share(min_share: float) -> None:
    if not 0 <= min_share <= 1:
        raise ValueError(f"min_share must lie in [0, 1], got {min_share}")


def _check_volume(min_volume_mm3: float) -> None:
    if not 0 <= min_volume_mm3 < np.inf:
        raise ValueError(f"min_volume_mm3 must be 0 or more, got {min_volume_mm3}")


class _OfLabelMaps(MapTransform):
    """Changes label maps (1, D, H, W) or (1, H, W) in a bundle's post-processing; MetaTensors keep what they carry."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        output = dict(data)
        for key in self.key_iterator(output):
            label_map = output[key]
            if label_map.dim() not in (3, 4) or label_map.shape[0] != 1:
                raise ValueError(f"{key!r} must be one label map, (1, D, H, W) or (1, H, W), got {label_map.shape}")
            cleaned = torch.from_numpy(self.changed(label_map.numpy(force=True)[0], label_map)[None])
            is_meta = isinstance(label_map, MetaTensor)
            output[key] = MetaTensor(cleaned).copy_meta_from(label_map) if is_meta else cleaned
        return output

    @abstractmethod
    def changed(self, labels: np.ndarray, tensor: torch.Tensor) -> np.ndarray:
        """The label map (D, H, W) or (H, W) of ``tensor``, changed."""


class DropSmallComponentsd(_OfLabelMaps):
    """:func:`drop_small_components` for label maps (1, D, H, W) in a bundle's post-processing.

    Args:
        keys: label maps.
        min_share: see :func:`clean`.
    """

    def __init__(self, keys: KeysCollection, min_share: float = 1.0, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        _check_share(min_share)
        self.min_share = min_share

    def changed(self, labels: np.ndarray, tensor: torch.Tensor) -> np.ndarray:
        return drop_small_components(labels, self.min_share)


class DropSmallVolumesd(_OfLabelMaps):
    """Drops the pieces of each label that are smaller than so many mm3, by the affine of the label map.

    Args:
        keys: label maps, :class:`monai.data.MetaTensor`.
        min_volume_mm3: see :func:`clean`.

    Raises:
        ValueError: a label map without an affine.
    """

    def __init__(self, keys: KeysCollection, min_volume_mm3: float, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        _check_volume(min_volume_mm3)
        self.min_volume_mm3 = min_volume_mm3

    def changed(self, labels: np.ndarray, tensor: torch.Tensor) -> np.ndarray:
        if not isinstance(tensor, MetaTensor):
            raise ValueError("the volume of a voxel is not known: pass a MetaTensor with the affine of the label map")
        axes = tensor.affine[:3, : labels.ndim].double()
        voxel_volume = float(torch.linalg.det(axes.T @ axes).sqrt())
        return _drop(labels, 0, self.min_volume_mm3 / voxel_volume)


class FillHolesOfLabelsd(_OfLabelMaps):
    """:func:`fill_holes_of_labels` for label maps (1, D, H, W) in a bundle's post-processing."""

    def changed(self, labels: np.ndarray, tensor: torch.Tensor) -> np.ndarray:
        return fill_holes_of_labels(labels)

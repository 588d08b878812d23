"""Preprocessing defined once: the same objects serve training, ``predict`` and MONAI's own commands.

They are MONAI dictionary transforms around the frames of ``medseg3d.geometry``. Arrays are (C, D, H, W).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import InvertibleTransform, MapTransform, Randomizable
from monai.utils import ensure_tuple

from medseg3d.geometry import Chain, Frame, Geometry, Resample
from medseg3d.io.labels import label_numbers


def body_box(array: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Start and stop (half open) of the box of all voxels above ``threshold``; the whole array when there are none.

    Args:
        array: (D, H, W).
        threshold: HU for CT; -500 separates tissue from air.
    """
    above = array > threshold
    start, stop = np.zeros(3, int), np.array(array.shape)
    for axis in range(3):
        hit = np.flatnonzero(above.any(axis=tuple(other for other in range(3) if other != axis)))
        if hit.size == 0:
            return np.zeros(3, int), np.array(array.shape)
        start[axis], stop[axis] = hit[0], hit[-1] + 1
    return start, stop


class ModelGrid:
    """The rule that leads from an image's own grid to the grid that a network sees.

    Args:
        orientation: codes of the network's axes, such as "RAS".
        spacing: mm along each of these axes.
        crop_above: crop to the box of voxels above this value (HU for CT); None keeps the whole volume.
        crop_margin: mm kept around that box.
        shape: voxels along each of these axes, whatever their size; ``spacing`` is not used then.
        upsample: False leaves axes whose voxels are larger than ``spacing`` as they are.
    """

    def __init__(
        self,
        orientation: str = "RAS",
        spacing: Sequence[float] = (1.5, 1.5, 1.5),
        crop_above: float | None = None,
        crop_margin: float = 0.0,
        shape: Sequence[int] | None = None,
        upsample: bool = True,
    ) -> None:
        self.orientation = orientation
        self.spacing = tuple(float(value) for value in spacing)
        self.shape = None if shape is None else tuple(shape)
        self.crop_above = crop_above
        self.crop_margin = float(crop_margin)
        self.upsample = upsample

    def frame(self, array: np.ndarray, affine: np.ndarray) -> Chain:
        """The record reorient -> crop -> resample for one image (D, H, W)."""
        reorient = Geometry(array.shape, affine).reorient(self.orientation)
        frames: list[Frame] = [reorient]
        grid = reorient.target
        if self.crop_above is not None:
            start, stop = body_box(reorient.image(array), self.crop_above)
            margin = np.ceil(self.crop_margin / np.asarray(grid.spacing)).astype(int)
            crop = grid.crop(np.maximum(start - margin, 0), np.minimum(stop + margin, grid.shape))
            frames.append(crop)
            grid = crop.target
        spacing = self.spacing if self.upsample else np.maximum(self.spacing, grid.spacing)
        frames.append(grid.resample(shape=self.shape) if self.shape else grid.resample(spacing=spacing))
        return Chain(frames)


def labels_by_interpolation(frame: Frame, channels: Sequence[np.ndarray]) -> np.ndarray:
    """Carry each class's map through ``frame`` by linear interpolation and take the largest, one class at a time.

    Smoother than moving the labels themselves, and memory does not grow with the number of classes. What lies outside
    the source becomes background.

    Args:
        channels: K arrays (D, H, W), class 0 first: logits, probabilities or masks.

    Returns:
        (D, H, W) on ``frame.target``, uint8 (uint16 above 255 classes). Ties go to the lower class.
    """
    interpolating, moving = _split_at_last_resample(frame)
    best = np.array(interpolating.image(np.asarray(channels[0], np.float32)))
    labels = np.zeros(best.shape, np.uint8 if len(channels) <= 256 else np.uint16)
    for number, channel in enumerate(channels[1:], start=1):
        moved = interpolating.image(np.asarray(channel, np.float32))
        wins = moved > best
        labels[wins] = number
        np.maximum(best, moved, out=best)
    return labels if moving is None else moving.label_map(labels)


def _split_at_last_resample(frame: Frame) -> tuple[Frame, Frame | None]:
    """The part of a chain that interpolates, and the part behind it that only moves voxels."""
    frames = frame.frames if isinstance(frame, Chain) else (frame,)
    last = max((n for n, part in enumerate(frames) if isinstance(part, Resample)), default=0)
    behind = frames[last + 1 :]
    return Chain(frames[: last + 1]), Chain(behind) if behind else None


class ToModelGridd(MapTransform, InvertibleTransform):
    """Bring images, and label maps with them, onto the network's grid; ``monai.transforms.Invertd`` takes them back.

    The first key decides the crop; all keys must lie on one grid. Label maps are moved by interpolating each label's
    mask, so that thin organs keep their shape.

    Args:
        keys: images first; each (C, D, H, W).
        label_keys: those of ``keys`` that hold label numbers.
        orientation, spacing, crop_above, crop_margin, shape, upsample: see :class:`ModelGrid`.
        spacing_key: where mm along each axis of the grid are written, (3,); None for nowhere.
    """

    def __init__(
        self,
        keys: KeysCollection,
        label_keys: KeysCollection = (),
        orientation: str = "RAS",
        spacing: Sequence[float] = (1.5, 1.5, 1.5),
        crop_above: float | None = None,
        crop_margin: float = 0.0,
        allow_missing_keys: bool = False,
        shape: Sequence[int] | None = None,
        upsample: bool = True,
        spacing_key: str | None = None,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.label_keys = ensure_tuple(label_keys)
        self.grid = ModelGrid(orientation, spacing, crop_above, crop_margin, shape, upsample)
        self.spacing_key = spacing_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        output = dict(data)
        frame: Chain | None = None
        for key in self.key_iterator(output):
            image = _as_meta_tensor(output[key])
            array = image.detach().cpu().numpy()
            if frame is None:
                frame = self.grid.frame(array[0], image.affine.numpy())
            else:
                _require_grid(key, _geometry(image), self.keys[0], frame.source)
            if key in self.label_keys:
                array = label_numbers(array, repr(key))
            moved = _move_labels(frame, array) if key in self.label_keys else frame.image(array)
            result = MetaTensor(torch.from_numpy(_own(moved)), meta=dict(image.meta))
            result.applied_operations = list(image.applied_operations)
            self.push_transform(result, orig_size=array.shape[1:], extra_info={"frame": frame})
            result.affine = torch.from_numpy(frame.target.affine.copy())
            output[key] = result
        if frame is not None and self.spacing_key is not None:
            output[self.spacing_key] = torch.tensor(frame.target.spacing)
        return output

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        output = dict(data)
        for key in self.key_iterator(output):
            record = self.pop_transform(output[key])
            frame = record["extra_info"]["frame"].inverse()
            tensor = output[key]
            array = tensor.detach().cpu().numpy()
            # Whole numbers in one channel are labels: interpolating them would invent labels in between.
            labels = array.shape[0] == 1 and (array == np.round(array)).all()
            moved = frame.label_map(array.astype(np.int32)).astype(array.dtype) if labels else frame.image(array)
            result = MetaTensor(torch.from_numpy(_own(moved)), meta=dict(tensor.meta))
            result.applied_operations = list(tensor.applied_operations)
            result.affine = torch.from_numpy(frame.target.affine.copy())
            output[key] = result
        return output


class AxesLiked(MapTransform):
    """Label maps with axes in the order and the directions of an image's, as two files of one case may differ in them.

    Args:
        keys: label maps; each (C, D, H, W) with an affine.
        reference: the key of the image whose axes are taken.

    Raises:
        ValueError: one lies on another grid than the reference even then, or holds fractions or numbers below 0.
    """

    def __init__(self, keys: KeysCollection, reference: str = "image", allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.reference = reference

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        output = dict(data)
        wanted = _geometry(_as_meta_tensor(output[self.reference]))
        for key in self.key_iterator(output):
            given = _as_meta_tensor(output[key])
            array = given.numpy(force=True)
            labels = label_numbers(array, repr(key)).astype(array.dtype, copy=False)
            turn = _geometry(given).reorient(wanted.orientation)
            _require_grid(key, turn.target, self.reference, wanted)
            turned = torch.from_numpy(_own(turn.image(labels)))
            output[key] = MetaTensor(turned, affine=torch.from_numpy(turn.target.affine.copy()), meta=dict(given.meta))
        return output


def _geometry(image: MetaTensor) -> Geometry:
    depth, height, width = image.shape[1:]
    return Geometry((depth, height, width), image.affine.numpy())


def _require_grid(key: Hashable, grid: Geometry, reference: Hashable, wanted: Geometry) -> None:
    if not wanted.coincides(grid):
        raise ValueError(
            f"{key!r} does not lie on the grid of {reference!r}: {grid} for {wanted}; resample it to that grid first"
        )


class LabelsOnInputGridd(MapTransform):
    """Logits on the network's grid to a label map on the grid of the input image.

    Replaces argmax and ``Invertd``: the classes are interpolated and the largest taken at full resolution.

    Args:
        keys: predictions, each (K, D, H, W).
        orig_keys: for each, the image that went through :class:`ToModelGridd`.
    """

    def __init__(self, keys: KeysCollection, orig_keys: KeysCollection = "image") -> None:
        super().__init__(keys)
        self.orig_keys = ensure_tuple(orig_keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        output = dict(data)
        for key, orig_key in zip(self.keys, self.orig_keys * len(self.keys), strict=False):
            image = output[orig_key]
            frame = applied_frame(image)
            logits = output[key].detach().float().cpu().numpy()
            labels = labels_by_interpolation(frame.inverse(), logits)
            meta = dict(image.meta)
            result = MetaTensor(torch.from_numpy(_own(labels)[None]), meta=meta)
            result.affine = torch.from_numpy(frame.source.affine.copy())
            output[key] = result
        return output


def applied_frame(image: MetaTensor) -> Frame:
    """The frame that :class:`ToModelGridd` recorded in ``image``; ValueError if it was not applied."""
    for record in reversed(getattr(image, "applied_operations", [])):
        if record["class"] == ToModelGridd.__name__:
            return record["extra_info"]["frame"]
    raise ValueError("the image carries no record of ToModelGridd: put it into the preprocessing")


def _move_labels(frame: Frame, array: np.ndarray) -> np.ndarray:
    present = np.unique(array)
    numbers = np.concatenate([[0], present[present > 0]]).astype(np.int64)
    winners = labels_by_interpolation(frame, _Masks(array[0], numbers))
    return numbers[winners].astype(np.uint8 if numbers[-1] <= 255 else np.uint16)[None]


class _Masks(Sequence[np.ndarray]):
    """Where an array has each of some numbers; a mask is made when it is asked for."""

    def __init__(self, array: np.ndarray, numbers: np.ndarray) -> None:
        self.array, self.numbers = array, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return _Masks(self.array, self.numbers[index])
        return self.array == self.numbers[index]


def _own(array: np.ndarray) -> np.ndarray:
    """The array itself or, where it is a read-only view (of the caller's data, perhaps), a copy."""
    return np.require(array, requirements=["C_CONTIGUOUS", "WRITEABLE"])


def _as_meta_tensor(value: Any) -> MetaTensor:
    return value if isinstance(value, MetaTensor) else MetaTensor(torch.as_tensor(value))


class RandMirrorLateralityd(MapTransform, Randomizable):
    """Mirror left and right at random and exchange the labels of paired organs.

    A plain flip would teach that a left parotid may be called right. Axis 1 of (C, D, H, W) must run from left to right
    or right to left, as it does in orientation "RAS".

    Args:
        keys: images and label maps; each (C, D, H, W).
        label_keys: those of ``keys`` that hold label numbers.
        pairs: label numbers that change places, such as ((3, 4),).
        annotated_key: a list with one entry a class that must change places too, if present.
        prob: probability of mirroring.
    """

    def __init__(
        self,
        keys: KeysCollection,
        label_keys: KeysCollection = (),
        pairs: Sequence[Sequence[int]] = (),
        annotated_key: str = "annotated",
        prob: float = 0.5,
    ) -> None:
        super().__init__(keys)
        self.label_keys = ensure_tuple(label_keys)
        self.pairs = [tuple(pair) for pair in pairs]
        self.annotated_key = annotated_key
        self.prob = prob

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        output = dict(data)
        if self.R.random() >= self.prob:
            return output
        for key in self.keys:
            flipped = torch.flip(torch.as_tensor(output[key]), dims=(1,))
            output[key] = swap_labels(flipped, self.pairs) if key in self.label_keys else flipped
        if self.annotated_key in output:
            annotated = list(output[self.annotated_key])
            for a, b in self.pairs:
                annotated[a], annotated[b] = annotated[b], annotated[a]
            output[self.annotated_key] = annotated
        return output


def swap_labels(labels: torch.Tensor, pairs: Sequence[Sequence[int]]) -> torch.Tensor:
    """A copy of a label map in which each pair of numbers has changed places."""
    swapped = labels.clone()
    for a, b in pairs:
        swapped[labels == a] = b
        swapped[labels == b] = a
    return swapped


class RandFieldOfViewd(MapTransform, Randomizable):
    """Keep a random box and put air around it, as in a scan that was cropped close.

    Args:
        keys: images and label maps; each (C, D, H, W), all of one shape.
        label_keys: those of ``keys`` that hold label numbers; around the box they become background.
        fill: value around the box in the images.
        min_share: the box has between this share and all of each axis.
        prob: probability of doing it.
    """

    def __init__(
        self,
        keys: KeysCollection,
        label_keys: KeysCollection = (),
        fill: float = 0.0,
        min_share: float = 0.5,
        prob: float = 0.2,
    ) -> None:
        super().__init__(keys)
        self.label_keys = ensure_tuple(label_keys)
        self.fill = fill
        self.min_share = min_share
        self.prob = prob

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        output = dict(data)
        if self.R.random() >= self.prob:
            return output
        shape = np.array(output[self.keys[0]].shape[1:])
        size = np.ceil(shape * self.R.uniform(self.min_share, 1, 3)).astype(int)
        start = np.floor((shape - size + 1) * self.R.random(3)).astype(int)
        box = (slice(None), *(slice(a, a + n) for a, n in zip(start.tolist(), size.tolist(), strict=True)))
        for key in self.keys:
            values = torch.as_tensor(output[key])
            cropped = torch.full_like(values, 0 if key in self.label_keys else self.fill)
            cropped[box] = values[box]
            output[key] = cropped
        return output

"""Where each label lies: one pass over a label map finds all boxes, and measures then look only inside them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from scipy import ndimage

Box = tuple[slice, ...]
_MANY = 1 << 16  # SciPy makes room for every number up to the largest label


def as_label_map(array: np.ndarray) -> np.ndarray:
    """`array` as an integer label map of any dimension; a bool mask becomes the label 1.

    Raises ValueError when the values are neither integers nor bool.
    """
    array = np.asarray(array)
    if array.dtype == bool:
        return array.view(np.uint8)
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"a label map holds integers, got {array.dtype}; convert it with .astype(np.uint8)")
    return array


def as_masks(predicted: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as bool masks, True where they are not 0.

    Raises ValueError when the shapes differ, or one holds fractions such as probabilities.
    """
    masks = np.asarray(predicted), np.asarray(reference)
    _check_shapes(*masks)
    if any(mask.dtype.kind == "f" and (mask % 1 != 0).any() for mask in masks):
        raise ValueError(
            "masks are True or other than 0 inside, got fractions such as probabilities: choose a threshold"
        )
    first, second = (mask if mask.dtype == bool else mask != 0 for mask in masks)
    return first, second


def label_boxes(label_map: np.ndarray, labels: Iterable[int]) -> dict[int, Box]:
    """Tight box of each of `labels` (>= 1) that occurs in `label_map`, in one pass; absent labels have no entry."""
    wanted = list(labels)
    if any(label < 1 for label in wanted):
        raise ValueError(f"labels to measure are 1 or more (0 is the background), got {sorted(wanted)}")
    array = as_label_map(label_map)
    turned = array.flags.f_contiguous and not array.flags.c_contiguous  # as files are read; SciPy is slow across memory
    array = array.T if turned else array
    places = {label: label for label in wanted}
    if max(wanted, default=1) > _MANY:
        numbers = np.unique(wanted)
        places = {label: place for place, label in enumerate(numbers.tolist(), 1)}
        place = np.searchsorted(numbers, array).clip(max=len(numbers) - 1)
        array = np.where(numbers[place] == array, place + 1, 0)
    found = ndimage.find_objects(array, max_label=max(places.values(), default=1))
    boxes = {label: found[places[label] - 1] for label in wanted if found[places[label] - 1] is not None}
    return {label: box[::-1] for label, box in boxes.items()} if turned else boxes


def label_masks(
    prediction: np.ndarray, reference: np.ndarray, labels: Iterable[int]
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """For each label: `(label, predicted mask, reference mask)`, both cropped to the box around the two.

    A label that neither map holds gives two empty masks. Raises ValueError when the shapes differ.
    """
    prediction, reference = as_label_map(prediction), as_label_map(reference)
    _check_shapes(prediction, reference)
    labels = list(labels)
    sides = (label_boxes(prediction, labels), label_boxes(reference, labels))
    nowhere = (slice(0, 0),) * prediction.ndim
    for label in labels:
        boxes = [side[label] for side in sides if label in side]
        box = _around(boxes) if boxes else nowhere
        yield label, prediction[box] == label, reference[box] == label


def _check_shapes(prediction: np.ndarray, reference: np.ndarray) -> None:
    if prediction.shape != reference.shape:
        raise ValueError(
            f"prediction and reference must lie on the same grid, got the shapes {prediction.shape} and "
            f"{reference.shape}; resample one onto the other first"
        )


def _around(boxes: list[Box]) -> Box:
    return tuple(slice(min(s.start for s in axis), max(s.stop for s in axis)) for axis in zip(*boxes, strict=True))

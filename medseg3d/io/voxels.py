"""Which voxels medseg3d takes: one number each on a 3D grid, in the smallest type that keeps it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# ITK and DICOM measure to the left and to the back, we to the right and to the front.
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def spatial_shape(shape: Sequence[int], name: object) -> tuple[int, int, int]:
    """The three axes of an image: trailing axes of one voxel beyond the third are dropped, anything else is refused."""
    axes = [int(n) for n in shape]
    while len(axes) > 3 and axes[-1] == 1:
        axes.pop()
    if len(axes) > 3:
        raise ValueError(
            f"{name} has {np.prod(axes[3:])} volumes (shape {tuple(axes)}); medseg3d takes one 3D volume:"
            " extract one, for example with nibabel's image.slicer[..., 0]"
        )
    if len(axes) < 3:
        raise ValueError(
            f"{name} is {len(axes)}D (shape {tuple(axes)}); medseg3d takes 3D volumes: give the whole scan"
        )
    return axes[0], axes[1], axes[2]


def plain_numbers(array: np.ndarray, name: object) -> np.ndarray:
    """The array with integers as they are, every other real type as float32, in this machine's byte order.

    Raises ValueError for complex numbers, colours and other voxels that are not one number.
    """
    if array.dtype.kind in "iu":
        return array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype.kind == "b":
        return array.astype(np.uint8)
    if array.dtype.kind == "f":
        return array.astype(np.float32, copy=False)
    kind = "colour" if array.dtype.fields else str(array.dtype)
    raise ValueError(f"{name} has {kind} voxels; medseg3d takes one real number a voxel: convert it to a scalar image")


def rescaled(array: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    """array * slope + intercept; integer where both are whole numbers and int32 suffices, float32 otherwise.

    Of the integer types the array's own is preferred, then int16. With slope 1 and intercept 0 it is the array itself.
    """
    if slope == 1 and intercept == 0:
        return array
    if array.dtype.kind in "iu" and array.size and float(slope).is_integer() and float(intercept).is_integer():
        ends = [int(end) * int(slope) + int(intercept) for end in (array.min(), array.max())]
        for dtype in (array.dtype, np.dtype(np.int16), np.dtype(np.int32)):
            if np.iinfo(dtype).min <= min(ends) and max(ends) <= np.iinfo(dtype).max:
                # Integers wrap, so the sum is right whenever it fits, whatever the product did on the way.
                result = array.astype(dtype)
                result *= np.array(int(slope)).astype(dtype)
                result += np.array(int(intercept)).astype(dtype)
                return result
    return array.astype(np.float32) * np.float32(slope) + np.float32(intercept)


def fortran_order(array: np.ndarray) -> np.ndarray:
    """The array (D, H, W) laid out as in files, first axis fastest: itself, or a copy."""
    if array.flags.f_contiguous:
        return array
    return _copied(array, np.empty(array.shape, array.dtype, order="F"))


def c_ordered(array: np.ndarray, dtype: np.dtype | type) -> np.ndarray:
    """A copy of the array (D, H, W) laid out as PyTorch does, last axis fastest, in another type."""
    return array.astype(dtype) if array.flags.c_contiguous else _copied(array, np.empty(array.shape, dtype))


def _copied(array: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The target filled in blocks that stay in the cache, which takes a third of the time of one copy."""
    block = 16
    for i in range(0, array.shape[0], block):
        for k in range(0, array.shape[2], block):
            target[i : i + block, :, k : k + block] = array[i : i + block, :, k : k + block]
    return target

"""Random windows of cached volumes, turned, scaled and bent in the one pass that cuts them out.

Shape legend: arrays are (C, *spatial axes), with two or three axes; matrices act on voxel coordinates in array order.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, Randomizable
from monai.utils import ensure_tuple

# A cubic B-spline deformation cannot fold over while its control points move by less than their distance divided by
# this, for two and three axes (Choi and Lee, Graphical Models 2000; Rueckert et al., MICCAI 2006).
FOLDS_AT = {2: 2.05, 3: 2.48}


class RandAffineCropd(MapTransform, Randomizable):
    """A window around a random voxel of a random class, randomly turned, scaled, shifted and bent.

    What ``RandCropByLabelClassesd`` and ``RandAffined`` do one after another, in one interpolation and without copies
    of the volume: several times faster on a CPU, and on a GPU if the volumes lie there. The window also shows what lies
    around it where a crop would have ended. Beyond the volume its border is continued. It is bent by a free-form
    deformation, a mesh of control points with cubic B-splines between them (Rueckert et al., IEEE TMI 1999).

    Args:
        keys: images and label maps; each (C, *spatial axes), all of one spatial shape.
        label_keys: those of ``keys`` that hold label numbers: the nearest voxel's is taken.
        spatial_size: voxels of the window.
        ratios: how often each class, background first, is in the window's centre; classes that a volume does not have
            are left out.
        indices_key: for each class the flat indices of its voxels, as ``ClassesToIndicesd`` gives them; the key is
            removed.
        rotate: largest angle about each axis, in radians; one number for two spatial axes.
        scale: largest relative change of the size of voxels, for each axis.
        translate: largest shift of the window in voxels, for each axis.
        deform: largest shift of a control point in voxels, for each axis. What a voxel is moved by is a mean of four
            control points along each axis, so it is mostly far less.
        control_spacing: voxels between control points.
        spacing: mm along each axis of the window. The volumes may then lie on grids of their own, best on that of the
            scan, so that the window has been interpolated once and is as sharp as what a network is given later. None
            gives the window the volume's voxels.
        spacing_key: where the volume's own spacing is found, (axes,) in mm, as ``ToModelGridd`` writes it.

    Raises:
        ValueError: ranges or ratios that do not fit the axes or the classes; control points so close together that the
            window could fold over; a volume without any voxel to choose.
    """

    def __init__(
        self,
        keys: KeysCollection,
        label_keys: KeysCollection,
        spatial_size: Sequence[int],
        ratios: Sequence[float],
        indices_key: str = "label_cls_indices",
        rotate: Sequence[float] | float = 0.0,
        scale: Sequence[float] | float = 0.0,
        translate: Sequence[float] | float = 0.0,
        deform: Sequence[float] | float = 0.0,
        control_spacing: float = 16.0,
        spacing: Sequence[float] | None = None,
        spacing_key: str = "spacing",
    ) -> None:
        super().__init__(keys)
        self.label_keys = ensure_tuple(label_keys)
        self.size = tuple(int(voxels) for voxels in spatial_size)
        axes = len(self.size)
        self.ratios = np.asarray(ratios, float)
        self.indices_key = indices_key
        self.rotate = _ranges("rotate", rotate, 3 if axes == 3 else 1)
        self.scale = _ranges("scale", scale, axes)
        self.translate = _ranges("translate", translate, axes)
        self.deform = _ranges("deform", deform, axes)
        self.control_spacing = control_spacing
        self.spacing = None if spacing is None else np.array(spacing, float)
        if self.spacing is not None and (self.spacing.shape != (axes,) or not (self.spacing > 0).all()):
            raise ValueError(f"spacing must be {axes} numbers of mm above 0, got {spacing}")
        self.spacing_key = spacing_key
        most = control_spacing / FOLDS_AT[axes]
        if self.deform.max() > most:
            raise ValueError(
                f"deform may be at most control_spacing / {FOLDS_AT[axes]}, here {most:.2f}, or a window can "
                f"fold over, got {self.deform.max():g}: lower it, or raise control_spacing"
            )

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        output = dict(data)
        shape = tuple(output[self.keys[0]].shape[1:])
        window, volume = self._spacings(output)
        matrix = self._matrix() * window / volume[:, None]
        center = self._center(output.pop(self.indices_key), shape, window / volume)
        device = torch.as_tensor(output[self.keys[0]]).device
        grid = sampling_grid(shape, matrix, center, self.size, device, self._displacement(device))
        for key in self.keys:
            mode = "nearest" if key in self.label_keys else "bilinear"
            output[key] = sample(torch.as_tensor(output[key]), grid, mode)
        return output

    def _spacings(self, data: Mapping[Hashable, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Spacing of the window and of the volume, in one unit."""
        if self.spacing is None:
            return np.ones(len(self.size)), np.ones(len(self.size))
        if self.spacing_key not in data:
            raise ValueError(
                f"windows of {self.spacing.tolist()} mm need the volume's spacing in {self.spacing_key!r}: give "
                f"ToModelGridd(spacing_key={self.spacing_key!r})"
            )
        return self.spacing, np.asarray(data[self.spacing_key], float)

    def _center(self, indices: Sequence[Any], shape: tuple[int, ...], ratio: np.ndarray) -> np.ndarray:
        """Voxel coordinates of the window's centre; a window without turn or shift lies within the volume."""
        if len(indices) != len(self.ratios):
            raise ValueError(f"there are {len(indices)} classes, but {len(self.ratios)} ratios: give one for each")
        ratios = np.where([len(one) > 0 for one in indices], self.ratios, 0.0)
        if not ratios.any():
            raise ValueError("the volume has no voxel of any class whose ratio is above 0")
        chosen = indices[int(self.R.choice(len(ratios), p=ratios / ratios.sum()))]
        half = (np.array(self.size) - 1) / 2
        voxel = np.unravel_index(int(chosen[self.R.randint(len(chosen))]), shape) + half % 1  # voxels upon voxels
        # Of a volume that is smaller than the window, the middle.
        low = np.minimum(half * ratio, (np.array(shape) - 1) / 2)
        return np.clip(voxel, low, np.array(shape) - 1 - low) + ratio * self.R.uniform(-self.translate, self.translate)

    def _matrix(self) -> np.ndarray:
        """What turns and scales, about the window's centre."""
        angles = self.R.uniform(-self.rotate, self.rotate)
        return rotation(angles) * self.R.uniform(1 - self.scale, 1 + self.scale)

    def _displacement(self, device: torch.device) -> torch.Tensor | None:
        """Voxels of the window that each of its voxels is moved by, (axes, *size)."""
        if not self.deform.any():
            return None
        weights = [bspline_weights(voxels, self.control_spacing).to(device) for voxels in self.size]
        most = self.deform.reshape(-1, *(1,) * len(self.size))
        points = self.R.uniform(-most, most, (len(self.size), *(one.shape[1] for one in weights)))
        return free_form(torch.as_tensor(points, dtype=torch.float32, device=device), weights)


def bspline_weights(voxels: int, spacing: float) -> torch.Tensor:
    """(voxels, control points): the share of each control point in each voxel along one axis, by cubic B-splines.

    ``spacing`` voxels lie between control points; the second of them lies on the first voxel.
    """
    position = torch.arange(voxels) / spacing
    distance = (position[:, None] + 1 - torch.arange(int(position[-1]) + 4)).abs()
    near = (4 - 6 * distance**2 + 3 * distance**3) / 6
    return torch.where(distance < 1, near, (2 - distance).clamp(min=0) ** 3 / 6)


def free_form(points: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """(axes, *size) of control points (axes, *mesh) and, for each axis of the mesh, its (size, mesh) weights."""
    for axis, weight in enumerate(weights, start=1):
        points = torch.tensordot(points, weight, dims=([axis], [1])).movedim(-1, axis)
    return points


def sampling_grid(
    shape: Sequence[int],
    matrix: np.ndarray,
    center: np.ndarray,
    size: Sequence[int],
    device: torch.device,
    displacement: torch.Tensor | None = None,
) -> torch.Tensor:
    """Where each voxel v of a window lies in an array: ``matrix @ (v + displacement - (size - 1) / 2) + center``, as
    ``grid_sample`` counts it (from -1 to 1 between an array's outer faces, last axis first).

    Args:
        shape: spatial shape of the array.
        matrix: (axes, axes), voxel coordinates in array order.
        center: (axes,), where the window's middle lies in the array.
        size: voxels of the window.
        device: where the grid is made, that of the array.
        displacement: (axes, *size) in voxels of the window, in array order.

    Returns:
        (1, *size, axes) float32.
    """
    axes = len(size)
    linear = 2 / np.array(shape, float)[:, None] * matrix
    offset = (2 * np.asarray(center) + 1) / np.array(shape) - 1
    steps = [
        (torch.arange(voxels, device=device) - (voxels - 1) / 2).view(-1, *(1,) * (axes - 1 - axis))
        for axis, voxels in enumerate(size)
    ]
    grid = torch.empty(*size, axes, device=device)
    for axis in range(axes):  # in array order; only the last of the sums has the size of the window
        terms = [step * factor for step, factor in zip(steps, linear[axis].tolist(), strict=True)]
        grid[..., axes - 1 - axis] = sum(terms[1:-1], terms[0] + float(offset[axis])) + terms[-1]
    if displacement is not None:
        factors = torch.as_tensor(linear[::-1].copy(), dtype=torch.float32, device=device)
        grid += torch.einsum("ga,a...->...g", factors, displacement)
    return grid[None]


def sample(values: torch.Tensor, grid: torch.Tensor, mode: str) -> torch.Tensor:
    """(C, *size) of an array (C, *shape), of its type; beyond the array its border is continued."""
    sampled = torch.nn.functional.grid_sample(
        values[None].float(), grid, mode=mode, padding_mode="border", align_corners=False
    )
    return sampled[0].to(values.dtype)


def rotation(angles: Sequence[float] | np.ndarray) -> np.ndarray:
    """One angle: (2, 2); three, about the first axis, then the second, then the third: (3, 3). Radians."""
    if len(angles) == 1:
        cos, sin = math.cos(angles[0]), math.sin(angles[0])
        return np.array([[cos, -sin], [sin, cos]])
    result = np.eye(3)
    for axis, angle in enumerate(angles):
        others = [other for other in range(3) if other != axis]
        turn = np.eye(3)
        turn[np.ix_(others, others)] = rotation([angle])
        result = turn @ result
    return result


def _ranges(name: str, value: Sequence[float] | float, count: int) -> np.ndarray:
    values = np.full(count, value, float) if np.isscalar(value) else np.asarray(value, float)
    if values.shape != (count,) or (values < 0).any():
        raise ValueError(f"{name} must be {count} numbers of 0 or more, got {value}")
    return values

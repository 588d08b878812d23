"""What a bundle's inferer and post-processing come to, so that a scan is segmented in slabs instead of as they stand.

A bundle says: windows, softmax, back to the scan's grid, argmax. Done in that order every class exists at every voxel
of the scan. The same labels come of slabs, and of interpolating only where labels meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from monai.inferers import SimpleInferer, SlidingWindowInferer
from monai.transforms import Activationsd, AsDiscreted, Compose, EnsureTyped, Invertd
from torch import nn

from medseg3d.data.transforms import LabelsOnInputGridd, applied_frame
from medseg3d.geometry import Geometry
from medseg3d.inference import Downsampled, Slices, SubVolumes
from medseg3d.inference.grid_map import AxisMap, along, between
from medseg3d.inference.strategy import Strategy

STRATEGIES: dict[str, type[Strategy]] = {"sub-volumes": SubVolumes, "slices": Slices, "downsampled": Downsampled}
INTERPOLATE, MOVE_LABELS = 1, 0


@dataclass(frozen=True)
class Recipe:
    """How a bundle segments.

    Attributes:
        strategy: in which windows or slices the network runs.
        order: 1 if the logits are interpolated onto the scan's grid, 0 if the labels are moved there.
        softmax: whether it is the softmax of the logits that is interpolated.
        by_frame: whether the way back is that of the recorded frame, as ``LabelsOnInputGridd`` takes it, rather than
            the one between the affines of both grids.
        rest: what happens to the label map then.
    """

    strategy: Strategy
    order: int
    softmax: bool
    by_frame: bool
    rest: Compose

    def maps(self, image: Any, scan: Geometry) -> tuple[AxisMap, ...]:
        """From the grid of a preprocessed ``image`` (C, D, H, W), a MetaTensor, to the scan's.

        Raises:
            ValueError: their axes are oblique to each other.
        """
        if self.by_frame:
            return along(applied_frame(image).inverse(), self.order)
        return _as_inverted(Geometry(tuple(image.shape[1:]), image.affine.cpu().numpy()), scan, self.order)


def find_recipe(inferer: Any, postprocessing: Callable) -> Recipe | None:
    """The recipe of what a bundle defines; None where that is none of the usual, and must be carried out as it stands.

    Of the post-processing these beginnings are known, for the key "pred": ``LabelsOnInputGridd``; softmax or nothing,
    ``Invertd``, argmax; softmax or nothing, argmax, ``Invertd`` with ``nearest_interp``.
    """
    strategy = as_strategy(inferer)
    steps = [step for step in steps_of(postprocessing) if not isinstance(step, EnsureTyped)]
    if strategy is None or not steps:
        return None
    if _is_labels_on_input_grid(steps[0]):
        return _recipe(strategy, INTERPOLATE, False, steps[1:], by_frame=True)
    softmax = _is_softmax(steps[0])
    if softmax:
        steps = steps[1:]
    if len(steps) < 2:
        return None
    first: Any
    second: Any
    first, second, *rest = steps
    if _is_inverse(first) and _is_argmax(second):
        return _recipe(strategy, MOVE_LABELS if first.nearest_interp[0] else INTERPOLATE, softmax, rest)
    # Without nearest_interp the numbers of labels are interpolated, which only the bundle itself may do.
    if _is_argmax(first) and _is_inverse(second) and second.nearest_interp[0]:
        return _recipe(strategy, MOVE_LABELS, softmax, rest)
    return None


def as_strategy(inferer: Any) -> Strategy | None:
    """The strategy that does what an inferer does: one of ours itself, or MONAI's in our terms; None for others."""
    if isinstance(inferer, Strategy):
        return inferer
    if type(inferer) is SimpleInferer:
        return SubVolumes(0, 0.0, "constant")
    if type(inferer) is not SlidingWindowInferer or getattr(inferer, "with_coord", False):
        return None
    return SubVolumes(
        inferer.roi_size,
        inferer.overlap,
        str(inferer.mode.value),
        inferer.sigma_scale,
        inferer.sw_batch_size,
        str(getattr(inferer.padding_mode, "value", inferer.padding_mode)),
        inferer.cval,
        inferer.roi_weight_map,
        device=inferer.device,
    )


def steps_of(transform: Any) -> Iterator[Callable]:
    """The transforms of nested ``Compose``, one after another."""
    if isinstance(transform, Compose):
        for step in transform.transforms:
            yield from steps_of(step)
    else:
        yield transform


def _recipe(
    strategy: Strategy, order: int, softmax: bool, rest: Sequence[Callable], by_frame: bool = False
) -> Recipe | None:
    # A second way back, or one more argmax, is not what was recognised.
    if any(isinstance(step, Invertd | LabelsOnInputGridd) or _is_argmax(step) for step in rest):
        return None
    return Recipe(strategy, order, softmax, by_frame, Compose(list(rest)))


def _is_labels_on_input_grid(step: Any) -> bool:
    return isinstance(step, LabelsOnInputGridd) and _of_pred(step) and tuple(step.orig_keys) == ("image",)


def _is_inverse(step: Any) -> bool:
    own = isinstance(step, Invertd) and _of_pred(step) and tuple(step.orig_keys) == ("image",)
    return own and step.post_func[0] is None


def _is_softmax(step: Any) -> bool:
    own = isinstance(step, Activationsd) and _of_pred(step) and _over_channels(step)
    return own and bool(step.softmax[0]) and not step.sigmoid[0] and step.other[0] is None


def _is_argmax(step: Any) -> bool:
    if not isinstance(step, AsDiscreted) or not _of_pred(step) or not _over_channels(step):
        return False
    others = (step.to_onehot[0], step.threshold[0], step.rounding[0])
    return bool(step.argmax[0]) and all(option is None for option in others)


def _of_pred(step: Any) -> bool:
    return tuple(step.keys) == ("pred",)


def _over_channels(step: Any) -> bool:
    options = step.converter.kwargs
    return options.get("dim", 0) == 0 and options.get("keepdim", True)


def _as_inverted(source: Geometry, scan: Geometry, order: int) -> tuple[AxisMap, ...]:
    """From a grid to the scan's as ``Invertd`` goes: between two voxels, however much coarser the scan's grid is."""
    steps = np.abs(np.linalg.solve(source.affine, scan.affine)[:3, :3]).max(axis=0)
    finer = np.ceil(steps.round(6)).astype(int).clip(min=1)  # voxels no larger than the source's are not smoothed
    affine = scan.affine.copy()
    affine[:3, :3] /= finer
    shape = tuple((size - 1) * n + 1 for size, n in zip(scan.shape, finer.tolist(), strict=True))
    maps = between(source, Geometry(shape, affine), order)
    return tuple(one.rows(np.arange(size) * n) for one, size, n in zip(maps, scan.shape, finer, strict=True))


def strategy_named(name: str, network: nn.Module, own: Strategy | None) -> Strategy:
    """The bundle's ``own`` strategy where it is of that name, else one of that name with usual sizes.

    Args:
        name: one of ``STRATEGIES``.
        network: whose convolutions tell whether it is for slices or for volumes.

    Raises:
        ValueError: no such strategy, or one that the network cannot take part in.
    """
    if name not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {name!r}")
    flat = not any(isinstance(module, nn.Conv3d) for module in network.modules())
    if flat != (name == "slices"):
        fitting = "slices" if flat else "sub-volumes or downsampled"
        raise ValueError(
            f"strategy {name!r} does not suit a network of {2 if flat else 3}D convolutions: take {fitting}"
        )
    kind = STRATEGIES[name]
    return own if isinstance(own, kind) else kind(96) if kind is SubVolumes else kind()

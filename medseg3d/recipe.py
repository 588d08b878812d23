"""What a bundle's inferer and post-processing come to, so that a scan is segmented in slabs instead of as they stand.

A bundle says: windows, softmax, back to the scan's grid, argmax. Done in that order every class exists at every voxel
of the scan. The same labels come of slabs, and of interpolating only where labels meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.inferers import SimpleInferer, SlidingWindowInferer, SlidingWindowInfererAdapt
from monai.transforms import Activationsd, AsDiscreted, Compose, EnsureTyped, Invertd
from torch import nn

from medseg3d.data.transforms import LabelsOnInputGridd, applied_frame
from medseg3d.geometry import Geometry
from medseg3d.inference import Downsampled, Slices, SubVolumes
from medseg3d.inference.body import body_on_grid
from medseg3d.inference.grid_map import AxisMap, along, between, edge_to_edge, through
from medseg3d.inference.onto_grid import labels_onto
from medseg3d.inference.slabs import Slab
from medseg3d.inference.strategy import Strategy
from medseg3d.inference.uncertainty import Watch
from medseg3d.io.voxels import c_ordered
from medseg3d.volume import Volume

STRATEGIES: dict[str, type[Strategy]] = {"sub-volumes": SubVolumes, "slices": Slices, "downsampled": Downsampled}
WINDOW_EDGE = 96  # voxels, of sub-volumes for bundles that have none of their own
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

    def labels(
        self,
        image_BC: torch.Tensor,
        maps: Sequence[AxisMap],
        network: Callable,
        timed: Callable[[Iterable[Slab]], Iterable[Slab]] = iter,
        uncertainty: str | None = None,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Labels on the scan's grid and, if it is asked for, how sure the network is there, in one pass of it.

        Args:
            image_BC: the preprocessed image (1, C, *spatial).
            maps: from its grid to the scan's, see :meth:`maps`.
            network: as the strategy takes it.
            timed: hands the network's slabs on, one by one as they come.
            uncertainty: "entropy" or "margin"; None for none.
        """
        strategy = self.strategy
        slabs: Iterable[Slab] = strategy.slabs(image_BC, network)
        if isinstance(strategy, Downsampled):  # straight from its small grid to the scan's
            slabs = (strategy.small(image_BC, network) for _ in range(1))
            maps = through(maps, edge_to_edge(strategy.size, image_BC.shape[2:]))
        if uncertainty is None:
            return labels_onto(timed(slabs), maps, self.softmax), None
        watch = Watch(uncertainty)
        return labels_onto(watch.each(timed(slabs)), maps, self.softmax), watch.onto(maps)


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


def keeps_axes(inferer: Any) -> bool:
    """Whether an inferer is known to give its network windows whose axes are the image's, or slices of ours."""
    return as_strategy(inferer) is not None or type(inferer) in (SlidingWindowInferer, SlidingWindowInfererAdapt)


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
    return own if isinstance(own, kind) else kind(WINDOW_EDGE) if kind is SubVolumes else kind()


def cropped_to_body(inferer: Any, image: Any, volume: Volume) -> SubVolumes:
    """An inferer of windows that lays them over the box of the body only.

    The body is looked for in the scan's own voxels: what preprocessing makes of air and tissue is not known.

    Args:
        image: (C, D, H, W), a MetaTensor: the preprocessed scan.
        volume: the scan, in HU.
    """
    strategy = as_strategy(inferer)
    assert isinstance(strategy, SubVolumes)
    grid = Geometry(tuple(image.shape[1:]), image.affine.cpu().numpy())
    box = body_on_grid(volume.array, volume.geometry, grid)
    return strategy.changed(crop=lambda image_C: box)


def as_loaded(volume: Volume) -> MetaTensor:
    """What MONAI's ``LoadImaged`` would have given for the same file, read by medseg3d's own readers."""
    affine = torch.from_numpy(volume.affine.copy())
    meta = {
        "original_affine": affine.clone(),
        "spatial_shape": np.array(volume.shape),
        "original_channel_dim": "no_channel",
        "filename_or_obj": str(volume.header.get("path", "")),
        "space": "RAS",
    }
    return MetaTensor(torch.from_numpy(c_ordered(volume.array, np.float32)), affine=affine, meta=meta)


def as_prediction(labels: np.ndarray, affine: np.ndarray) -> MetaTensor:
    """A label map (D, H, W) on the grid of the scan as the (1, D, H, W) that post-processing takes."""
    tensor = torch.from_numpy(np.ascontiguousarray(labels))[None]
    return MetaTensor(tensor, affine=torch.from_numpy(affine.copy()))

"""What segmenting a scan will take, from one window that is tried; and what can be given up to stay within limits.

Shape legend: image_BC... is (batch, channels, *spatial axes).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
import torch

from medseg3d.errors import is_out_of_memory
from medseg3d.inference import Downsampled, SubVolumes
from medseg3d.inference.device import room_on
from medseg3d.inference.feeding import device_of
from medseg3d.inference.graphs import WORTH_FROM
from medseg3d.inference.strategy import Strategy
from medseg3d.io import LabelTable, write_label_map, write_volume
from medseg3d.recipe import Recipe, as_prediction
from medseg3d.trial import Afterwards, WindowCost, current_memory, looked_at, measure_window, windows_of
from medseg3d.volume import Volume

GIB = 2**30
# Label maps of a slab that exist together while its labels are found and moved to the scan's grid, one byte a voxel.
_MAPS_OF_A_SLAB = 8
# Share of a slab's voxels that lie along borders, whose channels are copied when labels are interpolated.
_ON_BORDERS = 0.15
# Windows that go through a network at once on a GPU: more take memory and hardly less time.
AT_ONCE_ON_GPU = 4
# Of a GPU's free memory: the most that windows may take, and an image that is moved there.
_SHARE_OF_WINDOWS = 0.8
_SHARE_OF_IMAGE = 0.25

T = TypeVar("T")


class OverMemoryLimit(MemoryError, ValueError):
    """A scan needs more memory than it may have, whatever is given up."""


@dataclass(frozen=True)
class Plan:
    """How a scan will be segmented and what it will take.

    Attributes:
        strategy: the strategy, with what was given up.
        order: 1 if logits are interpolated onto the scan's grid, 0 if labels are moved there.
        windows: how many go through the network.
        seconds: of all stages; those of ``Segmenter.plan`` go from the scan's file to that of its labels.
        ram, vram: bytes at the peak, of the whole process and on the device.
        steps: what was given up to stay within the limits, in words.
        stages: seconds by stage, with the names of a run's report.
    """

    strategy: Strategy
    order: int
    windows: int
    seconds: float
    ram: int
    vram: int
    steps: tuple[str, ...] = field(default=())
    stages: Mapping[str, float] = field(default_factory=dict)

    def after(self, seconds: Mapping[str, float]) -> Plan:
        """The plan with the stages that come before its own."""
        stages = {**seconds, **self.stages}
        return replace(self, stages=stages, seconds=sum(stages.values()))

    def fits(self, max_ram: int | None, max_vram: int | None) -> bool:
        return (max_ram is None or self.ram <= max_ram) and (max_vram is None or self.vram <= max_vram)

    def __str__(self) -> str:
        lines = [
            f"strategy: {type(self.strategy).__name__}, {self.windows} windows",
            f"labels onto the scan's grid: {'logits interpolated' if self.order else 'nearest'}",
            f"time: about {self.seconds:.0f} s{self._stages()}",
            f"memory: about {self.ram / GIB:.2f} GiB",
        ]
        if self.vram:
            lines.append(f"memory of the device: about {self.vram / GIB:.2f} GiB")
        return "\n".join([*lines, *(f"given up: {step}" for step in self.steps)])

    def _stages(self) -> str:
        told = [f"{name} {seconds:.1f}" for name, seconds in self.stages.items() if seconds >= 0.05]
        return f" ({', '.join(told)})" if told else ""


def make_plan(
    strategy: Strategy,
    order: int,
    image_BC: torch.Tensor,
    target_shape: Sequence[int],
    network: Callable,
    max_ram: int | None = None,
    max_vram: int | None = None,
    afterwards: Afterwards | None = None,
    beside: int = 0,
) -> Plan:
    """The plan for one image (1, C, *spatial) on the network's grid and a scan of ``target_shape``.

    One window goes through the network twice. Over a limit, these are given up one after another until the plan fits:
    batches of windows, CUDA graphs, blending on the device, float32 sums, interpolated logits.

    Args:
        strategy, order: what the bundle wants.
        max_ram, max_vram: bytes; None for no limit.
        afterwards: what happens on the scan's grid; None leaves its time out.
        beside: bytes that are held from the network to the end besides labels, for a map of uncertainty perhaps.

    Raises:
        ValueError: there are several networks, or what they return is not one tensor.
        OverMemoryLimit: the last plan does not fit.
    """
    if isinstance(network, torch.nn.ModuleDict | torch.nn.ModuleList):
        raise ValueError(
            "a plan, and so a memory limit, is for one network, but the bundle has several, or mirror makes one of "
            "each axis of slices: leave the plan and the limits out, or mirror"
        )
    costs: dict[int, WindowCost] = {}
    held = beside + current_memory()  # before windows are tried, whose memory the process may keep

    def plan(strategy: Strategy, order: int, steps: tuple[str, ...]) -> Plan:
        batch = getattr(strategy, "batch_size", 1)
        if batch not in costs:
            costs[batch] = measure_window(strategy, image_BC, network)
        estimated = _estimate(strategy, order, image_BC, target_shape, costs[batch], device, steps)
        return replace(estimated, ram=estimated.ram + held)

    device = device_of(network, image_BC.device)
    strategy = with_room(strategy, image_BC, network, max_vram)
    found = plan(strategy, order, ())
    for changed, changed_order, step in _ladder(strategy, order, device):
        if found.fits(max_ram, max_vram):
            break
        found = plan(changed, changed_order, (*found.steps, step))
    if not found.fits(max_ram, max_vram):
        raise OverMemoryLimit(_refusal(found, max_ram, max_vram))
    cost = costs[getattr(found.strategy, "batch_size", 1)]
    if afterwards is None or cost.values is None:
        return found
    last, ram = afterwards.tried(found.order, cost, image_BC.dim() - 2, isinstance(found.strategy, Downsampled))
    stages = {**found.stages, **last}
    return replace(found, stages=stages, seconds=sum(stages.values()), ram=max(found.ram, beside + ram))


def what_follows(
    recipe: Recipe, data: Mapping[str, Any], volume: Volume, table: LabelTable, uncertainty: str | None = None
) -> Afterwards:
    """What happens to the labels of a preprocessed scan: post-processing, and the files that are written.

    Raises:
        ValueError: the axes of the scan's grid are oblique to those of the network's.
    """

    def postprocess(labels: np.ndarray) -> None:
        with suppress(Exception):  # one that needs the whole scan cannot be tried on a part of it
            recipe.rest({**data, "pred": as_prediction(labels, volume.affine)})

    def write(labels: np.ndarray) -> None:
        with TemporaryDirectory() as folder:
            write_label_map(Volume(labels, volume.affine), Path(folder) / "labels.nii.gz", table)

    def write_map(unsure: np.ndarray) -> None:
        with TemporaryDirectory() as folder:
            write_volume(Volume(unsure, volume.affine), Path(folder) / "uncertainty.nii.gz")

    steps = {"postprocess": postprocess, "write": write}
    maps = recipe.maps(data["image"], volume.geometry)
    return Afterwards(maps, recipe.softmax, steps, uncertainty, {"write": write_map} if uncertainty else {})


def _ladder(strategy: Strategy, order: int, device: torch.device) -> Iterator[tuple[Strategy, int, str]]:
    """Strategies that need less and less memory, and what each gives up."""
    if isinstance(strategy, SubVolumes):
        if strategy.batch_size > 1:
            strategy = strategy.changed(batch_size=1)
            yield strategy, order, "one window at a time"
        if device.type == "cuda" and strategy.graph:
            strategy = strategy.changed(graph=False)
            yield strategy, order, "no CUDA graph of the network"
        if device.type != "cpu" and strategy.device != torch.device("cpu"):
            strategy = strategy.changed(device="cpu")
            yield strategy, order, "windows are blended in the memory of the CPU"
        if strategy.accumulate != torch.bfloat16:
            strategy = strategy.changed(accumulate=torch.bfloat16)
            yield strategy, order, "sums of windows in bfloat16"
    if order:
        yield strategy, 0, "nearest labels instead of interpolated logits"


def with_room(strategy: Strategy, image_BC: torch.Tensor, network: Callable, max_vram: int | None = None) -> Strategy:
    """On a CUDA device, the strategy with as many windows at once as its memory has room for; else as it is.

    They are ``AT_ONCE_ON_GPU`` at most, or more where the strategy itself takes more. One window is tried.
    """
    device = device_of(network, image_BC.device)
    if device.type != "cuda" or not isinstance(strategy, SubVolumes):
        return strategy
    cost = measure_window(strategy.changed(batch_size=1), image_BC, network)
    slab, copies = _of_slab(strategy, 1, image_BC, cost.channels)
    room = room_on(device, max_vram) - (0 if strategy.device == torch.device("cpu") else slab + copies)
    most = min(max(strategy.batch_size, AT_ONCE_ON_GPU), strategy.count(image_BC.shape[2:]))
    return strategy.changed(batch_size=windows_in(room, cost.vram * (2 if strategy.graph else 1), most))


def windows_in(room: int, one: int, most: int) -> int:
    """How many windows of ``one`` byte count each fit into ``room``: one at least, ``most`` at most."""
    return max(1, min(most, int(_SHARE_OF_WINDOWS * room) // max(1, one)))


class Room:
    """The memory of a device, and how scan after scan makes use of it.

    Args:
        device: where networks run.
        max_vram: bytes that may be used there.
        planned: strategies come from :func:`make_plan`, so that no more windows at once are to be found room for.
    """

    def __init__(self, device: torch.device, max_vram: int | None = None, planned: bool = False) -> None:
        self.device = device
        self.max_vram = max_vram
        self.planned = planned
        self._at_once: int | None = None

    def place(self, image_BC: torch.Tensor, strategy: Strategy | None) -> torch.Tensor:
        """The image on the device; where it is, if windows can come from there and the room is needed for them."""
        may_stay = self.device.type == "cuda" and isinstance(strategy, SubVolumes)
        if may_stay and image_BC.nbytes > _SHARE_OF_IMAGE * room_on(self.device, self.max_vram):
            return image_BC
        return image_BC.to(self.device)

    def run(
        self,
        make: Callable[[Strategy, torch.Tensor], T],
        strategy: Strategy,
        image_BC: torch.Tensor,
        network: Callable,
        warnings: list[str],
    ) -> T:
        """``make(strategy, image)``, with as many windows at once as there is room for.

        Where the device's memory runs out, it is made once more with as little of it as may be, and a warning says so.

        Raises:
            Exception: that was too much too; or what ``make`` raises for another reason.
        """
        try:
            return make(self._filled(strategy, image_BC, network), image_BC)
        except Exception as error:  # of PyTorch, of a library under it, or of NumPy
            if not isinstance(strategy, SubVolumes) or not is_out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0]
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        warnings.append(
            f"the device's memory ran out, so windows went there one by one and were blended on the CPU: {reason}"
        )
        return make(strategy.changed(batch_size=1, device="cpu", graph=False), image_BC.cpu())

    def _filled(self, strategy: Strategy, image_BC: torch.Tensor, network: Callable) -> Strategy:
        if self.planned or self.device.type != "cuda" or not isinstance(strategy, SubVolumes):
            return strategy
        if self._at_once is None:  # found once for all scans
            self._at_once = getattr(with_room(strategy, image_BC, network, self.max_vram), "batch_size", 1)
        return strategy.changed(batch_size=self._at_once)


def _of_slab(strategy: Strategy, order: int, image_BC: torch.Tensor, channels: int) -> tuple[int, int]:
    """Bytes of the sums of windows, and of what is made of a slab while it gets its labels."""
    slab, voxels = strategy.blending(looked_at(strategy, image_BC), channels)
    return slab, _MAPS_OF_A_SLAB * voxels + (int(_ON_BORDERS * voxels * channels * 4) if order else 0)


def _estimate(
    strategy: Strategy,
    order: int,
    image_BC: torch.Tensor,
    target_shape: Sequence[int],
    cost: WindowCost,
    device: torch.device,
    steps: tuple[str, ...],
) -> Plan:
    batch = getattr(strategy, "batch_size", 1)
    windows = windows_of(strategy, image_BC)
    slab, copies = _of_slab(strategy, order, image_BC, cost.channels)
    on_device = device.type != "cpu" and getattr(strategy, "device", None) != torch.device("cpu")
    recorded = device.type == "cuda" and getattr(strategy, "graph", False) and windows // batch >= WORTH_FROM
    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    stages = {"network": cost.once + cost.seconds * windows / batch, "labels": cost.labelling * image_BC[0, 0].numel()}
    ram = cost.ram + prod(target_shape) + (0 if on_device else slab + copies)
    vram = held + cost.vram * (2 if recorded else 1) + (slab + copies if on_device else 0)
    return Plan(strategy, order, windows, sum(stages.values()), ram, vram, steps, stages)


def _refusal(plan: Plan, max_ram: int | None, max_vram: int | None) -> str:
    parts = []
    if max_ram is not None and plan.ram > max_ram:
        parts.append(f"{plan.ram / GIB:.2f} GiB of memory, but {max_ram / GIB:.2f} are allowed")
    if max_vram is not None and plan.vram > max_vram:
        parts.append(f"{plan.vram / GIB:.2f} GiB on the device, but {max_vram / GIB:.2f} are allowed")
    given_up = f" even with {', '.join(plan.steps)}" if plan.steps else ""
    return f"the scan needs about {' and '.join(parts)}{given_up}: crop it, or allow more"

"""What segmenting a scan will take, from one window that is tried; and what can be given up to stay within limits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch

from medseg3d.inference import SubVolumes
from medseg3d.inference.heads import split_head
from medseg3d.inference.slabs import Slab
from medseg3d.inference.strategy import Strategy
from medseg3d.inference.sub_volumes import SPLIT_FROM_WINDOWS
from medseg3d.report.run import count_peak_anew, recent_peak_mb

GIB = 2**30
# Label maps of a slab that exist together while its labels are found and moved to the scan's grid, one byte a voxel.
_MAPS_OF_A_SLAB = 8
# Share of a slab's voxels that lie along borders, whose channels are copied when labels are interpolated.
_ON_BORDERS = 0.15


class OverMemoryLimit(MemoryError, ValueError):
    """A scan needs more memory than it may have, whatever is given up."""


@dataclass(frozen=True)
class WindowCost:
    """What one batch of windows takes.

    Attributes:
        seconds: of the network.
        labelling: seconds a voxel, to find the label.
        ram, vram: bytes beyond what the process and the device held before.
        channels: that are blended: classes, or fewer where the head comes after.
    """

    seconds: float
    labelling: float
    ram: int
    vram: int
    channels: int


@dataclass(frozen=True)
class Plan:
    """How a scan will be segmented and what it will take.

    Attributes:
        strategy: the strategy, with what was given up.
        order: 1 if logits are interpolated onto the scan's grid, 0 if labels are moved there.
        windows: how many go through the network.
        seconds: from the scan in memory to its labels.
        ram, vram: bytes at the peak, of the whole process and on the device.
        steps: what was given up to stay within the limits, in words.
    """

    strategy: Strategy
    order: int
    windows: int
    seconds: float
    ram: int
    vram: int
    steps: tuple[str, ...] = field(default=())

    def fits(self, max_ram: int | None, max_vram: int | None) -> bool:
        return (max_ram is None or self.ram <= max_ram) and (max_vram is None or self.vram <= max_vram)

    def __str__(self) -> str:
        lines = [
            f"strategy: {type(self.strategy).__name__}, {self.windows} windows",
            f"labels onto the scan's grid: {'logits interpolated' if self.order else 'nearest'}",
            f"time: about {self.seconds:.0f} s",
            f"memory: about {self.ram / GIB:.2f} GiB",
        ]
        if self.vram:
            lines.append(f"memory of the device: about {self.vram / GIB:.2f} GiB")
        return "\n".join([*lines, *(f"given up: {step}" for step in self.steps)])


def make_plan(
    strategy: Strategy,
    order: int,
    image_BC: torch.Tensor,
    target_shape: Sequence[int],
    network: Callable,
    max_ram: int | None = None,
    max_vram: int | None = None,
) -> Plan:
    """The plan for one image (1, C, *spatial) on the network's grid and a scan of ``target_shape``.

    One window goes through the network twice. Over a limit, these are given up one after another until the plan fits:
    batches of windows, blending on the device, float32 sums, interpolated logits.

    Args:
        strategy, order: what the bundle wants.
        max_ram, max_vram: bytes; None for no limit.

    Raises:
        ValueError: there are several networks, or what they return is not one tensor.
        OverMemoryLimit: the last plan does not fit.
    """
    if isinstance(network, torch.nn.ModuleDict | torch.nn.ModuleList):
        raise ValueError("a plan, and so a memory limit, is for one network, but the bundle has several: leave it out")
    costs: dict[int, WindowCost] = {}

    def plan(strategy: Strategy, order: int, steps: tuple[str, ...]) -> Plan:
        batch = getattr(strategy, "batch_size", 1)
        if batch not in costs:
            costs[batch] = measure_window(strategy, image_BC, network)
        return _estimate(strategy, order, image_BC, target_shape, costs[batch], steps)

    found = plan(strategy, order, ())
    for changed, changed_order, step in _ladder(strategy, order, image_BC.device):
        if found.fits(max_ram, max_vram):
            break
        found = plan(changed, changed_order, (*found.steps, step))
    if not found.fits(max_ram, max_vram):
        raise OverMemoryLimit(_refusal(found, max_ram, max_vram))
    return found


def _ladder(strategy: Strategy, order: int, device: torch.device) -> Iterator[tuple[Strategy, int, str]]:
    """Strategies that need less and less memory, and what each gives up."""
    if isinstance(strategy, SubVolumes):
        if strategy.batch_size > 1:
            strategy = strategy.changed(batch_size=1)
            yield strategy, order, "one window at a time"
        if device.type != "cpu" and strategy.device != torch.device("cpu"):
            strategy = strategy.changed(device="cpu")
            yield strategy, order, "windows are blended in the memory of the CPU"
        if strategy.accumulate != torch.bfloat16:
            strategy = strategy.changed(accumulate=torch.bfloat16)
            yield strategy, order, "sums of windows in bfloat16"
    if order:
        yield strategy, 0, "nearest labels instead of interpolated logits"


def measure_window(strategy: Strategy, image_BC: torch.Tensor, network: Callable) -> WindowCost:
    """What a batch of windows of an image takes, tried on one with much in it."""
    window = strategy.example(image_BC)
    batch = torch.cat([window] * getattr(strategy, "batch_size", 1))[: getattr(strategy, "batch_size", 1)]
    with torch.inference_mode(), peak_memory(image_BC.device) as peak:
        splits = isinstance(strategy, SubVolumes) and strategy.count(image_BC.shape[2:]) >= SPLIT_FROM_WINDOWS
        split = split_head(network, window) if splits else None
        body, head = split if split is not None else (network, None)
        body(batch)
        start = time.perf_counter()
        values = body(batch)
        if image_BC.device.type == "cuda":
            torch.cuda.synchronize(image_BC.device)
        seconds = time.perf_counter() - start
    if not isinstance(values, torch.Tensor):
        raise ValueError(f"a plan needs one tensor of logits, but the network returns a {type(values).__name__}")
    slab = Slab(0, 0, values[0], head)
    start = time.perf_counter()
    slab.labels()
    labelling = (time.perf_counter() - start) / prod(values.shape[2:])
    return WindowCost(seconds, labelling, peak.ram, peak.vram, values.shape[1])


def _estimate(
    strategy: Strategy,
    order: int,
    image_BC: torch.Tensor,
    target_shape: Sequence[int],
    cost: WindowCost,
    steps: tuple[str, ...],
) -> Plan:
    batch = getattr(strategy, "batch_size", 1)
    windows = strategy.count(image_BC.shape[2:])
    slab, slab_voxels = strategy.blending(image_BC.shape[2:], cost.channels)
    copies = _MAPS_OF_A_SLAB * slab_voxels
    if order:
        copies += int(_ON_BORDERS * slab_voxels * cost.channels * 4)
    on_device = image_BC.device.type != "cpu" and getattr(strategy, "device", None) != torch.device("cpu")
    seconds = cost.seconds * windows / batch + cost.labelling * image_BC[0, 0].numel()
    ram = current_memory() + cost.ram + prod(target_shape) + (0 if on_device else slab + copies)
    vram = cost.vram + (slab + copies if on_device else 0)
    return Plan(strategy, order, windows, seconds, ram, vram, steps)


def _refusal(plan: Plan, max_ram: int | None, max_vram: int | None) -> str:
    parts = []
    if max_ram is not None and plan.ram > max_ram:
        parts.append(f"{plan.ram / GIB:.2f} GiB of memory, but {max_ram / GIB:.2f} are allowed")
    if max_vram is not None and plan.vram > max_vram:
        parts.append(f"{plan.vram / GIB:.2f} GiB on the device, but {max_vram / GIB:.2f} are allowed")
    given_up = f" even with {', '.join(plan.steps)}" if plan.steps else ""
    return f"the scan needs about {' and '.join(parts)}{given_up}: crop it, or allow more"


@dataclass
class Peak:
    """Bytes that were held at first, and those beyond."""

    held: int = 0
    ram: int = 0
    vram: int = 0


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """What the block takes at its peak beyond what the process, and the device, held when it began."""
    peak = Peak(current_memory())
    count_peak_anew()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
    yield peak
    peak.ram = max(0, int((recent_peak_mb() or 0) * 2**20) - peak.held)
    if device.type == "cuda":
        peak.vram = torch.cuda.max_memory_allocated(device) - held


def current_memory() -> int:
    """Bytes of resident memory of this process; the peak so far where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return int((recent_peak_mb() or 0) * 2**20)
    import resource

    return pages * resource.getpagesize()

"""What a window of a scan takes, tried: time and memory of the network, and of what happens to labels afterwards.

Shape legend: image_BC... is (batch, channels, *spatial axes).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medseg3d.inference import CoarseToFine, SubVolumes
from medseg3d.inference.feeding import device_of
from medseg3d.inference.grid_map import AxisMap, edge_to_edge
from medseg3d.inference.heads import split_head
from medseg3d.inference.onto_grid import labels_onto
from medseg3d.inference.slabs import Head, Slab
from medseg3d.inference.strategy import Strategy
from medseg3d.inference.sub_volumes import SPLIT_FROM_WINDOWS
from medseg3d.inference.uncertainty import Watch
from medseg3d.report.run import count_peak_anew, recent_peak_mb

# Voxels of the scan's grid on which is tried what happens there.
_TRIED = 2**22


@dataclass(frozen=True)
class WindowCost:
    """What one batch of windows takes.

    Attributes:
        seconds: of the network, and of blending what it gives.
        labelling: seconds a voxel, to find the label.
        ram, vram: bytes beyond what the process and the device held before.
        channels: that are blended: classes, or fewer where the head comes after.
        once: seconds before the first batch: to take off the head, and what the first one takes longer than others.
        values: (C, *window) what is blended.
        head: what makes logits of it.
    """

    seconds: float
    labelling: float
    ram: int
    vram: int
    channels: int
    once: float = 0.0
    values: torch.Tensor | None = None
    head: Head | None = None


@dataclass(frozen=True)
class Afterwards:
    """What happens on the scan's grid, tried on labels of a window to see how long it takes.

    Attributes:
        maps: from the network's grid to the scan's.
        softmax: whether probabilities are interpolated.
        steps: by name: what is done with a label map then.
        uncertainty: "entropy" or "margin" if that map is made too.
        steps_of_map: by name: what is done with it then.
    """

    maps: Sequence[AxisMap]
    softmax: bool = False
    steps: Mapping[str, Callable[[np.ndarray], object]] = field(default_factory=dict)
    uncertainty: str | None = None
    steps_of_map: Mapping[str, Callable[[np.ndarray], object]] = field(default_factory=dict)

    def tried(self, order: int, cost: WindowCost, dims: int, whole: bool) -> tuple[dict[str, float], int]:
        """For a whole scan: seconds of "labels", the way onto the scan's grid, and of each step; bytes at the peak.

        Args:
            order: of interpolation.
            cost: of a window of ``dims`` axes (or fewer), whose labels these are.
            whole: it is the whole image on a grid of its own.
        """
        assert cost.values is not None, "a window was measured"
        inside = [int(one.weights.any(axis=1).sum()) for one in self.maps]
        values = cost.values if cost.values.dim() == dims + 1 else cost.values.unsqueeze(1)
        source = values.shape[1:] if whole else [one.weights.shape[1] for one in self.maps]
        zoom = (prod(inside) / prod(source)) ** (1 / dims)
        few = min(values.shape[1], max(1, int(_TRIED / (zoom**dims * prod(values.shape[2:])))))
        values = values.narrow(1, (values.shape[1] - few) // 2, few).float()
        size = [max(1, round(length * zoom)) for length in values.shape[1:]]
        maps = edge_to_edge(values.shape[1:], size, order)
        start = time.perf_counter()
        labels, unsure = self._made([Slab(0, 0, values, cost.head)], maps)
        seconds = {"labels": (time.perf_counter() - start) * prod(inside) / labels.size}
        share = prod(one.weights.shape[0] for one in self.maps) / labels.size
        with peak_memory(torch.device("cpu")) as peak:
            for made, steps in ((labels, self.steps), (unsure, self.steps_of_map)):
                for name, step in steps.items():
                    start = time.perf_counter()
                    step(made)
                    seconds[name] = seconds.get(name, 0.0) + (time.perf_counter() - start) * share
        return seconds, peak.held + int(peak.ram * share)

    def _made(self, slabs: Sequence[Slab], maps: Sequence[AxisMap]) -> tuple[np.ndarray, Any]:
        if self.uncertainty is None:
            return labels_onto(slabs, maps, self.softmax), None
        watch = Watch(self.uncertainty)
        return labels_onto(watch.each(slabs), maps, self.softmax), watch.onto(maps)


def measure_window(strategy: Strategy, image_BC: torch.Tensor, network: Callable) -> WindowCost:
    """What a batch of windows of an image takes, tried on one with much in it."""
    device = device_of(network, image_BC.device)
    begin = time.perf_counter()
    window = strategy.example(image_BC).to(device)
    batch = torch.cat([window] * getattr(strategy, "batch_size", 1))[: getattr(strategy, "batch_size", 1)]
    with torch.inference_mode(), peak_memory(device) as peak:
        splits = isinstance(strategy, SubVolumes) and windows_of(strategy, image_BC) >= SPLIT_FROM_WINDOWS
        split = split_head(network, window) if splits else None
        body, head = split if split is not None else (network, None)
        body(batch)
        _finish(device)
        start = time.perf_counter()
        values = body(batch)
        _finish(device)
        seconds = time.perf_counter() - start
        once = max(0.0, start - begin - seconds)
    if not isinstance(values, torch.Tensor):
        raise ValueError(f"a plan needs one tensor of logits, but the network returns a {type(values).__name__}")
    own = values[0]
    if isinstance(strategy, CoarseToFine) and len(own) == 1:
        own = torch.cat([-own, own])  # it makes two classes of the organ's logit
    start = time.perf_counter()
    Slab(0, 0, own, head).labels()
    _finish(device)
    labelling = (time.perf_counter() - start) / prod(values.shape[2:])
    seconds += _blending(strategy, window, values) * len(batch)
    return WindowCost(seconds, labelling, peak.ram, peak.vram, values.shape[1], once, own, head)


def _blending(strategy: Strategy, window: torch.Tensor, values: torch.Tensor) -> float:
    """Seconds to add what the network gives for a window to the sums."""
    if not isinstance(strategy, SubVolumes):
        return 0.0
    alone = strategy.changed(crop=None, progress=None, with_coordinates=False, graph=False)
    start = time.perf_counter()
    with torch.inference_mode():
        for _ in alone.slabs(window, lambda _: values[:1]):
            pass
    _finish(values.device)
    return time.perf_counter() - start


def windows_of(strategy: Strategy, image_BC: torch.Tensor) -> int:
    """How many windows of an image go through the network."""
    return strategy.count(looked_at(strategy, image_BC))


def looked_at(strategy: Strategy, image_BC: torch.Tensor) -> list[int]:
    """Spatial size of the part of an image that windows are laid over."""
    return [part.stop - part.start for part in strategy.box(image_BC)]


def _finish(device: torch.device) -> None:
    """Wait for what was started on a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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

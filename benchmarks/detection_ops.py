"""RoIAlign and non-maximum suppression against torchvision's compiled operations, where torchvision is installed.

    python benchmarks/detection_ops.py [--rounds 7] [--threads 1] [--device cpu]

Pyramid maps are those of an 800x1333 image with 256 channels (P2 to P5), in either memory format; regions are spread
over the image with sides from 12 to 800 pixels. Boxes for suppression lie in clusters, as proposals do. Outputs are
compared before anything is timed. All sides take turns in one process; times are medians, ratios medians of the ratios
within a round. "MiB" is the peak over what was held before, in a process of its own for each side. Without torchvision
there are no ratios.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from measuring import Run, describe_machine, in_child, median_ratio, peak_memory, restart_with, take_turns

from medseg3d.networks.detection.boxes import clip_boxes_to_image
from medseg3d.networks.detection.nms import batched_nms, nms
from medseg3d.networks.detection.roi_align import MultiScaleRoIAlign

try:
    import torchvision
except (ImportError, RuntimeError):  # its compiled part needs the very build of torch it was made for
    torchvision = None

IMAGE = (800, 1333)
MAPS = {"0": (200, 334), "1": (100, 167), "2": (50, 84), "3": (25, 42)}
OURS, THEIRS = "medseg3d", "torchvision"


def regions(count: int, seed: int = 0) -> torch.Tensor:
    """Boxes (N, 4) of all sizes and shapes, in the image."""
    random = torch.Generator().manual_seed(seed)
    u = torch.rand(count, 4, generator=random)
    size = 12 * (800 / 12) ** u[:, 0]
    ratio = 2 ** (2 * u[:, 1] - 1)
    sides = torch.stack((size * ratio, size / ratio), 1)
    centres = u[:, 2:] * torch.tensor([IMAGE[1], IMAGE[0]])
    return clip_boxes_to_image(torch.cat((centres - sides / 2, centres + sides / 2), 1), IMAGE)


def clusters(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes (N, 4), ten around each of N / 10 objects, and their scores."""
    random = torch.Generator().manual_seed(seed)
    objects = regions(count // 10, seed).repeat(10, 1)
    sides = (objects[:, 2:] - objects[:, :2]).repeat(1, 2)
    boxes = objects + 0.1 * sides * torch.randn(len(objects), 4, generator=random)
    return clip_boxes_to_image(boxes, IMAGE), torch.rand(len(boxes), generator=random)


def pooling(
    side: str,
    device: torch.device,
    count: int = 1000,
    size: int = 7,
    backward: bool = False,
    channels_last: bool = False,
) -> Run:
    """Pooled features of regions, and with ``backward`` the gradients of the maps as well."""
    random = torch.Generator().manual_seed(1)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    maps = {
        name: torch.randn(1, 256, *hw, generator=random).to(device, memory_format=layout) for name, hw in MAPS.items()
    }
    boxes = [regions(count).to(device)]
    make = MultiScaleRoIAlign if side == OURS else torchvision.ops.MultiScaleRoIAlign
    pool = make(list(MAPS), size, 2)
    if backward:
        for feature in maps.values():
            feature.requires_grad_()

    def run() -> torch.Tensor:
        pooled = pool(maps, boxes, [IMAGE])
        if not backward:
            return pooled
        gradients = torch.autograd.grad(pooled, list(maps.values()), torch.ones_like(pooled))
        return torch.cat([gradient.flatten() for gradient in gradients])

    return run


def suppression(side: str, device: torch.device, count: int = 2000, groups: int = 0) -> Run:
    """Indices of the boxes that stay at 0.7."""
    boxes, scores = (values.to(device) for values in clusters(count))
    if not groups:
        function: Callable[..., torch.Tensor] = nms if side == OURS else torchvision.ops.nms
        return lambda: function(boxes, scores, 0.7)
    function = batched_nms if side == OURS else torchvision.ops.batched_nms
    idxs = torch.arange(len(boxes), device=device) % groups
    return lambda: function(boxes, scores, idxs, 0.7)


CASES: dict[str, tuple[Callable[..., Run], dict[str, Any]]] = {
    "RoIAlign, 1000 regions, 7x7": (pooling, {}),
    "the same, channels-last maps": (pooling, {"channels_last": True}),
    "the same, forward and backward": (pooling, {"backward": True}),
    "RoIAlign, 100 regions, 14x14": (pooling, {"count": 100, "size": 14}),
    "NMS, 2000 boxes": (suppression, {}),
    "NMS, 200 boxes": (suppression, {"count": 200}),
    "batched NMS, 5 levels of 1000": (suppression, {"count": 5000, "groups": 5}),
    "batched NMS, 80 classes, 2000 boxes": (suppression, {"count": 2000, "groups": 80}),
}


def memory(case: str, side: str, device: str) -> float:
    make, arguments = CASES[case]
    torch.set_num_threads(1)
    return peak_memory(make(side, torch.device(device), **arguments), torch.device(device)).added


def agree(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal indices; features and gradients up to rounding."""
    return torch.equal(a, b) if a.dtype == torch.long else bool((a - b).abs().max() <= 1e-5 * b.abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    restart_with("default", arguments.threads)
    device = torch.device(arguments.device)
    sides = [OURS] if torchvision is None else [OURS, THEIRS]
    print(
        describe_machine(device, "default") + ("" if torchvision is None else f", {THEIRS} {torchvision.__version__}")
    )
    print("\n| case | side | ms | time of torchvision's | MiB |\n|---|---|---|---|---|")
    for case, (make, options) in CASES.items():
        runs = {side: make(side, device, **options) for side in sides}
        results = [run() for run in runs.values()]
        assert all(agree(results[0], result) for result in results[1:]), f"{case}: the sides do not agree"
        seconds = take_turns(runs, arguments.rounds, device)
        for side in sides:
            ratio = f"{median_ratio(seconds[side], seconds[THEIRS]):.2f}" if THEIRS in sides else ""
            mib = in_child(memory, case, side, arguments.device)
            print(f"| {case} | {side} | {1000 * median(seconds[side]):.1f} | {ratio} | {mib:.0f} |", flush=True)


if __name__ == "__main__":
    main()

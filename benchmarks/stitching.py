"""Windows to labels without a network: our slabs and MONAI's ``sliding_window_inference`` with an argmax.

    python benchmarks/stitching.py --classes 105 14
    python benchmarks/stitching.py --lengths 100 200 400 800

The network is canned: for every window it hands over the same features or logits, made once. Labels are compared first.
"features" is what medseg3d does where a network ends in a convolution of kernel 1 from 32 channels to the classes;
"logits" is what it does elsewhere. MONAI gets logits in both, at no cost. All take turns; ratios are medians of ratios
within a round, of wall time and of CPU time, which other work on the machine disturbs less; memory is the peak that a
process of its own adds. ``--lengths`` measures memory instead, for a scan of 512x512xLENGTH voxels at 0.8x0.8x1.5 mm
and 1.5 mm windows of 96^3, to labels on the scan's own grid.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import measuring
import torch
from torch import nn

from medseg3d.geometry import Geometry
from medseg3d.inference import SubVolumes
from medseg3d.inference.grid_map import between
from medseg3d.inference.onto_grid import labels_onto

ROI = (96, 96, 96)
FEATURES = 32
CPU = torch.device("cpu")


class Canned(nn.Module):
    """Features that do not depend on the window but for its mean, and a head."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        coarse = torch.randn(1, FEATURES, 12, 12, 12, generator=generator)
        self.register_buffer("features", nn.functional.interpolate(coarse, ROI, mode="trilinear"))
        self.head = nn.Conv3d(FEATURES, classes, 1)
        nn.init.normal_(self.head.weight, generator=generator)
        nn.init.zeros_(self.head.bias)

    def forward(self, window: torch.Tensor) -> torch.Tensor:
        size = (slice(0, length) for length in window.shape[2:])
        return self.head(self.features[(..., *size)])


def monai(size: tuple[int, ...], logits: torch.Tensor) -> torch.Tensor:
    from monai.inferers import sliding_window_inference

    image = torch.zeros(1, 1, *size)
    # A copy, since MONAI weights what the network returns where it lies.
    whole = sliding_window_inference(image, ROI, 1, lambda window: logits.clone(), 0.5, mode="gaussian")
    return whole.argmax(1).to(torch.uint8)


def ours(size: tuple[int, ...], network: Callable, accumulate: torch.dtype = torch.float32) -> torch.Tensor:
    return SubVolumes(ROI, 0.5, accumulate=accumulate).label_map(torch.zeros(1, 1, *size), network)[:, 0]


def runs_of(classes: int, size: tuple[int, ...]) -> dict[str, Callable[[], torch.Tensor]]:
    network = Canned(classes).eval()
    with torch.inference_mode():
        logits = network(torch.zeros(1, 1, *ROI))
    runs: dict[str, Callable[[], torch.Tensor]] = {
        "MONAI": partial(monai, size, logits),
        "medseg3d, logits": partial(ours, size, lambda window: logits),
        "medseg3d, logits, bf16 sums": partial(ours, size, lambda window: logits, torch.bfloat16),
    }
    if classes > FEATURES:
        runs["medseg3d, features"] = partial(ours, size, network)
        runs["medseg3d, features, bf16 sums"] = partial(ours, size, network, torch.bfloat16)
    return runs


def memory_of(classes: int, size: tuple[int, ...], name: str, threads: int) -> measuring.Memory:
    torch.set_num_threads(threads)
    with torch.inference_mode():
        return measuring.peak_memory(runs_of(classes, size)[name], CPU)


def compare(classes: int, size: tuple[int, ...], rounds: int, threads: int) -> None:
    runs: dict[str, Callable[[], Any]] = runs_of(classes, size)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    with torch.inference_mode():
        found = {name: run() for name, run in runs.items()}
        for _ in range(rounds):
            for name, run in runs.items():
                wall, cpu = time.perf_counter(), time.process_time()
                run()
                seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    print(f"\n{classes} classes\n\n| | same labels | wall s | faster by | CPU s | fewer by | MiB | of MONAI's |")
    print("|---|---|---|---|---|---|---|---|")
    memory = {name: measuring.in_child(memory_of, classes, size, name, threads).added for name in runs}
    for name in runs:
        same = (found[name] == found["MONAI"]).float().mean().item()
        times = zip(zip(*seconds["MONAI"], strict=True), zip(*seconds[name], strict=True), strict=True)
        cells = [f"{median(own):.2f} | {measuring.median_ratio(base, own):.2f}" for base, own in times]
        share = memory[name] / memory["MONAI"]
        print(f"| {name} | {same:.4%} | {' | '.join(cells)} | {memory[name]:.0f} | {share:.2f} |")


def whole_scan(classes: int, length: int) -> None:
    """Labels on the grid of a scan of 512x512xlength from windows at 1.5 mm."""
    scan = Geometry((512, 512, length), torch.diag(torch.tensor([0.8, 0.8, 1.5, 1.0])).double().numpy())
    frame = scan.resample(spacing=(1.5, 1.5, 1.5))
    network = Canned(classes).eval()
    image = torch.zeros(1, 1, *frame.target.shape)
    labels_onto(SubVolumes(ROI, 0.5).slabs(image, network), between(frame.target, scan))


def memory_of_scan(classes: int, length: int, threads: int) -> measuring.Memory:
    torch.set_num_threads(threads)
    with torch.inference_mode():
        return measuring.peak_memory(partial(whole_scan, classes, length), CPU)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=[105, 14])
    parser.add_argument("--size", type=int, nargs=3, default=[256, 256, 200])
    parser.add_argument("--lengths", type=int, nargs="+", help="slices of whole scans whose memory is measured")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    measuring.restart_with("default", args.threads)
    torch.set_num_threads(args.threads)
    print(f"`python {shlex.join(sys.argv)}`\n")
    print(f"{measuring.describe_machine(CPU, 'default')}, {args.rounds} rounds.")
    if args.lengths:
        print("\n| classes | slices | MiB added, labels on the scan's grid included |\n|---|---|---|")
        for classes in args.classes:
            for length in args.lengths:
                memory = measuring.in_child(memory_of_scan, classes, length, args.threads)
                print(f"| {classes} | {length} | {memory.added:.0f} |", flush=True)
        return
    for classes in args.classes:
        compare(classes, tuple(args.size), args.rounds, args.threads)


if __name__ == "__main__":
    main()

"""Whole networks against torchvision, where torchvision is installed: same random weights, outputs compared first.

    python benchmarks/torchvision_networks.py [names ...] [--rounds 5] [--threads 1] [--channels-last] [--cpu-time]

Both sides are built as their libraries build them, in eval mode, and take turns in one process; times are medians,
ratios medians of the ratios within a round. Mask R-CNN has one class, so that random weights find objects and all of it
runs. ``--cpu-time`` counts the processor's time instead of the clock's, for machines that are busy with other work.
torchvision needs the very build of torch it was made for, in most installations one with CUDA: without it this says so
and ends, or with ``--ours`` times medseg3d alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from measuring import describe_machine, median_ratio, restart_with, take_turns
from torch import nn

from medseg3d.networks import fcn_resnet50, maskrcnn_resnet50_fpn
from medseg3d.networks.backbones.alexnet import alexnet
from medseg3d.networks.backbones.googlenet import googlenet
from medseg3d.networks.backbones.resnet import resnet50
from medseg3d.networks.backbones.swin_classifier import swin_t
from medseg3d.networks.backbones.vgg import vgg16

try:
    import torchvision
except (ImportError, RuntimeError):  # its compiled part needs the very build of torch it was made for
    torchvision = None

OURS, THEIRS = "medseg3d", "torchvision"
LARGEST_ERROR = 1e-3  # relative, of logits or of any part of a detection
MASK_RCNN = {"num_classes": 2}
FCN = {"num_classes": 21, "aux_loss": False}
NO_WEIGHTS = {"weights": None, "weights_backbone": None}


@dataclass(frozen=True)
class Case:
    """A network that both have, how torchvision's is found and built, and the height and width of its input."""

    ours: Callable[[], nn.Module]
    where: str = ""  # in torchvision.models
    arguments: dict[str, Any] | None = None
    size: tuple[int, int] = (224, 224)

    def theirs(self, name: str) -> nn.Module:
        module = getattr(torchvision.models, self.where) if self.where else torchvision.models
        return getattr(module, name)(**(self.arguments or {"weights": None}))


CASES = {
    "alexnet": Case(alexnet),
    "vgg16": Case(vgg16),
    "googlenet": Case(googlenet, arguments={"weights": None, "init_weights": False}),
    "resnet50": Case(resnet50),
    "swin_t": Case(swin_t),
    "fcn_resnet50": Case(lambda: fcn_resnet50(**FCN), "segmentation", NO_WEIGHTS | FCN, (520, 520)),
    "maskrcnn_resnet50_fpn": Case(
        lambda: maskrcnn_resnet50_fpn(norm_eps=1e-5, **MASK_RCNN), "detection", NO_WEIGHTS | MASK_RCNN, (800, 1333)
    ),
}


def built(name: str, sides: list[str], channels_last: bool) -> dict[str, nn.Module]:
    """The network of each side, all with the weights of the first one."""
    torch.manual_seed(0)
    networks = {side: CASES[name].ours() if side == OURS else CASES[name].theirs(name) for side in sides}
    state = networks[sides[0]].state_dict()
    for network in networks.values():
        network.load_state_dict(state)
        network.eval()
        if channels_last:
            network.to(memory_format=torch.channels_last)
    return networks


def tensors(result: Any) -> list[torch.Tensor]:
    """What a network returned, as tensors in one order: logits, or the parts of a detection."""
    if isinstance(result, torch.Tensor):
        return [result]
    values = [result[key] for key in sorted(result)] if isinstance(result, dict) else result
    return [tensor for value in values for tensor in tensors(value)]


def error_of(a: Any, b: Any) -> float:
    """The largest relative error (L2) among the tensors of two results; infinite where shapes differ."""
    pairs = list(zip(tensors(a), tensors(b), strict=True))
    if any(x.shape != y.shape for x, y in pairs):
        return float("inf")
    return max(((x - y).float().norm() / y.float().norm().clamp(min=1e-12)).item() for x, y in pairs)


def compare(name: str, sides: list[str], rounds: int, channels_last: bool, clock: Callable[[], float]) -> str:
    """A row of the table. SystemExit where the outputs differ."""
    networks = built(name, sides, channels_last)
    height, width = CASES[name].size
    x = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(1))
    images = list(x) if name.startswith("maskrcnn") else x
    if channels_last and isinstance(images, torch.Tensor):
        images = images.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        results = {side: network(images) for side, network in networks.items()}
        error = error_of(results[sides[0]], results[sides[-1]])
        if error > LARGEST_ERROR:
            raise SystemExit(f"{name}: the sides differ, by a relative error of {error:.1e}")
        runs = {side: lambda network=network: network(images) for side, network in networks.items()}
        seconds = take_turns(runs, rounds, torch.device("cpu"), clock=clock)
    times = [f"{1000 * median(seconds[side]):.0f}" if side in sides else "" for side in (OURS, THEIRS)]
    ratio = f"{median_ratio(seconds[OURS], seconds[THEIRS]):.2f}" if THEIRS in sides else ""
    layout = "channels-last" if channels_last else "as built"
    return f"| {name} | {height}x{width} | {layout} | {' | '.join(times)} | {ratio} | {error:.0e} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="names", help=f"of {', '.join(CASES)}; all without")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--channels-last", action="store_true", help="weights and images in this memory format")
    parser.add_argument("--cpu-time", action="store_true", help="the processor's time instead of the clock's")
    parser.add_argument("--ours", action="store_true", help="time medseg3d alone where torchvision is not installed")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(CASES):
        parser.error(f"names are of {', '.join(CASES)}, got {', '.join(sorted(unknown))}")
    if torchvision is None and not arguments.ours:
        print("skipped: torchvision is not installed, or not for this build of torch; --ours times medseg3d alone")
        return
    restart_with("default", arguments.threads)
    torch.set_num_threads(arguments.threads)
    sides = [OURS] if torchvision is None else [OURS, THEIRS]
    version = "" if torchvision is None else f", {THEIRS} {torchvision.__version__}"
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    print(describe_machine(torch.device("cpu"), "default") + version)
    print("\n| network | picture | layout | medseg3d ms | torchvision ms | time of torchvision's | error |")
    print("|---|---|---|---|---|---|---|")
    for name in arguments.names or CASES:
        print(compare(name, sides, arguments.rounds, arguments.channels_last, clock), flush=True)


if __name__ == "__main__":
    main()

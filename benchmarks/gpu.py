"""Networks and whole images on a GPU: our slabs and MONAI's sliding windows, CUDA graphs, compilers, training steps.

    python benchmarks/gpu.py
    python benchmarks/gpu.py scan --size 273 273 300 --classes 105 --batch 4
    python benchmarks/gpu.py window training --networks swin_unetr vnet
    python benchmarks/gpu.py --device cpu --size 64 64 80 --roi 64 --feature-size 12 --rounds 1    # does it run?

"scan" goes from an image on the device to labels on the device, through Swin UNETR in bfloat16: 150 windows of 96^3 by
default. "window" is one batch of windows, eager, as a CUDA graph and compiled. "training" is one step, in bfloat16 by
autocast: forward, cross-entropy, backward, AdamW. Both sides have the same weights; MONAI's networks have their fused
attention. Results are compared before times are printed. All take turns, and ratios are medians of ratios within a
round; on a GPU times are those of its own clock, and memory is what PyTorch has in use at the peak beyond what it held
before: weights, images, and all that a graph of a window keeps. Without MONAI its rows are left out, as is what fails,
with the reason. Progress goes to stderr; stdout is Markdown.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from statistics import median
from typing import Any

import measuring
import torch
from networks import CASES, Subject, Variant, Work, duration, note, print_header, print_row, switch_flash_on
from torch import nn

from medseg3d.inference.graphs import CudaRecording
from medseg3d.inference.precision import in_precision
from medseg3d.inference.sub_volumes import SubVolumes

ROWS = ("scan", "window", "training")
OVERLAP = 0.5
NO_GRAPH, NO_MONAI = "there are no CUDA graphs without a CUDA device", "MONAI is not installed"


@dataclass
class Entry:
    """One way to do the work, made ready: ``run`` is timed, ``result`` is compared."""

    run: Callable[[], Any]
    result: Callable[[], torch.Tensor]
    found: str = ""
    seconds: list[float] = field(default_factory=list)
    memory: measuring.Memory | None = None


def make_ready(makers: dict[str, Callable[[], Entry]], compare: Callable[[torch.Tensor, torch.Tensor], str]) -> dict:
    """The entries that can be made and run, each compared with the first."""
    entries: dict[str, Entry] = {}
    first: torch.Tensor | None = None
    for name, make in makers.items():
        try:
            entry = make()
            result = entry.result()
            first = result if first is None else first
            entry.found = compare(result, first)
            entry.run()
        except Exception as error:  # a compiler, a driver, or what the peer lacks: the other rows are worth having
            note(f"{name} is left out: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
            continue
        note(f"{name}: {entry.found}")
        entries[name] = entry
    return entries


def print_entries(entries: dict[str, Entry], args: argparse.Namespace, result: str, per: int = 1) -> None:
    """Times in turns, memory after that, and a row for each; ``per`` is what the work is counted in."""
    if not entries:
        return
    device = torch.device(args.device)
    runs = {name: entry.run for name, entry in entries.items()}
    for name, seconds in measuring.take_turns(runs, args.rounds, device, 1 if per > 1 else args.calls).items():
        entries[name].seconds = seconds
    base = next(iter(entries))
    print_header(["", result, "median s", "least to most", f"time of {base} / its own", "MiB"])
    for name, entry in entries.items():
        entry.memory = measuring.peak_memory(entry.run, device)
        span = f"{duration(min(entry.seconds))} to {duration(max(entry.seconds))}"
        ratio = measuring.median_ratio(entries[base].seconds, entry.seconds)
        cells = [name, entry.found, duration(median(entry.seconds)), span, f"{ratio:.2f}", f"{entry.memory.added:.0f}"]
        print_row(cells)


def same_labels(found: torch.Tensor, first: torch.Tensor) -> str:
    return f"{(found == first).float().mean().item():.3%}, {len(found.unique())} classes"


def relative_error(found: torch.Tensor, first: torch.Tensor) -> str:
    return f"{((found.float() - first.float()).norm() / first.float().norm()).item():.1e}"


# Whole images


def sliding_window(image: torch.Tensor, network: Callable, args: argparse.Namespace) -> torch.Tensor:
    from monai.inferers import sliding_window_inference

    logits = sliding_window_inference(image, [args.roi] * 3, args.batch, network, OVERLAP, mode="gaussian")
    return logits.argmax(1).to(torch.uint8)


def scan(args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    work = work_of("swin_unetr", args)
    image = torch.randn(1, 1, *args.size, generator=torch.Generator().manual_seed(2)).to(device)
    state: dict[str, torch.Tensor] = work.build("ours").state_dict()

    def network(side: str) -> nn.Module:
        built = work.build(side)
        built.load_state_dict(state)
        if side == "monai":
            switch_flash_on(built)
        return built.to(device).eval()

    def entry(label: Callable[[], torch.Tensor]) -> Entry:
        run = no_gradients(label)
        return Entry(run, run)

    def monai(dtype: torch.dtype) -> Entry:
        cast = in_precision(network("monai"), dtype)
        return entry(lambda: sliding_window(image, cast, args))

    def ours(**options: Any) -> Entry:
        cast = in_precision(network("ours"), torch.bfloat16)
        strategy = SubVolumes(args.roi, OVERLAP, batch_size=args.batch, **options)
        return entry(lambda: strategy.label_map(image, cast)[:, 0])

    def network_alone() -> Entry:
        cast = in_precision(network("ours"), torch.bfloat16)
        windows = image[..., : args.roi, : args.roi, : args.roi].repeat(args.batch, 1, 1, 1, 1)
        call: Callable = torch.inference_mode()(partial(CudaRecording, cast, windows))()
        batches = -(-count // args.batch)
        run = no_gradients(lambda: [call(windows) for _ in range(batches)][-1][:, 0] > 0)
        return Entry(run, run)

    count = SubVolumes(args.roi, OVERLAP).count(args.size)
    makers: dict[str, Callable[[], Entry]] = {
        "MONAI fp32": partial(monai, torch.float32),
        "MONAI bf16": partial(monai, torch.bfloat16),
        "medseg3d bf16, no graph": partial(ours, graph=False),
        "medseg3d bf16": ours,
        "medseg3d bf16, bf16 sums": partial(ours, accumulate=torch.bfloat16),
    }
    leave_out(makers)
    print(f"\n## {count} windows of {args.roi}^3 to labels, {args.classes} classes, batches of {args.batch}\n")
    entries = make_ready(makers, same_labels)
    if device.type == "cuda":
        entries |= make_ready({"network alone, graph": network_alone}, lambda found, first: "")
    print_entries(entries, args, "same labels", per=count)


def no_gradients(label: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    def run() -> torch.Tensor:
        with torch.inference_mode():
            return label()

    return run


# One window, one step


def work_of(network: str, args: argparse.Namespace, training: bool = False) -> Work:
    widths = {"swin_unetr": {"feature_size": args.feature_size}}
    return Work(
        network,
        args.roi,
        out_channels=args.classes,
        training=training,
        device=args.device,
        threads=args.threads,
        arguments=widths.get(network, {}),
    )


def entry_of(subject: Subject) -> Entry:
    return Entry(subject.run, subject.result)


def graph_of(subject: Subject) -> Entry:
    with torch.inference_mode():
        recording = CudaRecording(subject.call, subject.x)
    run = no_gradients(lambda: recording(subject.x))
    return Entry(run, lambda: run().float().cpu())


def subjects(network: str, args: argparse.Namespace, training: bool) -> dict[str, Callable[[], Entry]]:
    work = work_of(network, args, training)
    state = work.build("ours").state_dict()
    precision = "autocast" if training else "bf16"
    flash = CASES[network].takes_img_size or network == "swin_unetr"

    def make(side: str, compiled: bool, then: Callable[[Subject], Entry] = entry_of) -> Entry:
        variant = Variant(side, precision, flash=side == "monai" and flash and not training, compile=compiled)
        return then(Subject(work, variant, state))

    makers: dict[str, Callable[[], Entry]] = {
        "MONAI": partial(make, "monai", False),
        "MONAI compiled": partial(make, "monai", True),
        "medseg3d": partial(make, "ours", False),
        "medseg3d compiled": partial(make, "ours", True),
    }
    if not training:
        makers["medseg3d graph"] = partial(make, "ours", False, graph_of)
    if not args.compile:
        makers = {name: maker for name, maker in makers.items() if not name.endswith("compiled")}
    leave_out(makers)
    if args.device != "cuda" and makers.pop("medseg3d graph", None):
        note(f"medseg3d graph is left out: {NO_GRAPH}")
    return makers


def window(args: argparse.Namespace, training: bool = False) -> None:
    for network in args.networks:
        work = work_of(network, args, training)
        flops = measuring.count_flops(work.build("ours"), work.input_shape, backward=training)
        kind = "training step" if training else "window"
        print(f"\n## {network}, {kind} of {args.roi}^3, {args.classes} classes, {flops / 1e9:.0f} GFLOP\n")
        entries = make_ready(subjects(network, args, training), relative_error)
        print_entries(entries, args, "difference of gradients" if training else "difference of logits")


def leave_out(makers: dict[str, Callable[[], Entry]]) -> None:
    """Without MONAI the rows that need it."""
    if find_spec("monai") is None:
        for name in [name for name in makers if name.startswith("MONAI")]:
            del makers[name]
            note(f"{name} is left out: {NO_MONAI}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="row", help=f"any of {', '.join(ROWS)}; all by default")
    parser.add_argument("--networks", nargs="+", choices=CASES, default=["swin_unetr", "unetr", "vnet"])
    parser.add_argument("--size", type=int, nargs=3, default=[273, 273, 300], help="of the image, in voxels")
    parser.add_argument("--roi", type=int, default=96, help="edge of a window in voxels")
    parser.add_argument("--classes", type=int, default=105)
    parser.add_argument("--feature-size", type=int, default=48, help="of Swin UNETR")
    parser.add_argument("--batch", type=int, default=4, help="windows at once in whole images")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave compiled networks out")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=10, help="windows or steps timed together on a GPU")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if unknown := set(args.rows) - set(ROWS):
        parser.error(f"rows are {', '.join(ROWS)}, got {', '.join(sorted(unknown))}")
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True
    print(f"`python {shlex.join(sys.argv)}`\n")
    print(f"{measuring.describe_machine(torch.device(args.device), 'default')}, {args.rounds} rounds.")
    for row in args.rows or ROWS:
        {"scan": scan, "window": window, "training": partial(window, training=True)}[row](args)


if __name__ == "__main__":
    main()

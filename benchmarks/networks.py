"""One window through our networks and through MONAI's: same weights, same input, outputs compared before any timing.

    python benchmarks/networks.py compare vnet --precision bf16
    python benchmarks/networks.py compare swin_unetr --variants monai+fp32 monai+flash+channels_last ours ours+compile
    python benchmarks/networks.py compare unetr --mode training --precision autocast
    python benchmarks/networks.py table

A variant is ``monai`` or ``ours`` and options joined by ``+``: ``fp32``, ``bf16`` (weights and input cast once) or
``autocast`` (weights in fp32, bf16 autocast), ``flash`` (MONAI's use_flash_attention), ``channels_last``, ``compile``.
A variant that names no precision has that of ``--precision``.

Times are wall seconds; all variants take one turn a round in one process. Ratios are medians of ratios within a round.
The first call, which compiles where it is asked to, is reported apart. Memory comes from a process of its own for each
variant: "window MiB" is the peak over what the built network held, "process MiB" all that the process holds then.
GFLOP counts 2 operations a multiply-add in convolutions and matrix products, of MONAI's network where there is one.
The matrix product that shares are shares of takes its turn too; it is the library's best, not a bound: oneDNN's
convolutions can be faster than MKL's product.
A training step is forward, cross-entropy in fp32, backward and AdamW, batch 1, dropout off so that gradients compare.
Progress goes to stderr; stdout is Markdown.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import import_module
from statistics import median
from typing import Any

import measuring
import torch
from torch import nn
from torch.nn import functional as F

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "autocast": torch.bfloat16}
OPTIONS = (*PRECISIONS, "flash", "channels_last", "compile")
TABULATED = ("fp32", "bf16")
CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
# What differs by more is not the same network's: nothing is timed then. Gradients of a deep network with random weights
# are mostly rounding noise in bf16, so there the error is shown, and both sides are held to the limit in fp32.
LARGEST_ERROR = {"fp32": 1e-3, "bf16": 0.1, "autocast": 0.1}
LARGEST_GRADIENT_ERROR = {"fp32": 1e-3, "autocast": 1.0}


@dataclass(frozen=True)
class Case:
    """A network in its usual size: where the classes are and what they are called with."""

    ours: str
    monai: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    takes_img_size: bool = False


CASES = {
    "unet": Case("medseg3d.networks.unet:UNet"),
    "vnet": Case("medseg3d.networks.vnet:VNet", "monai.networks.nets:VNet"),
    "unetr": Case("medseg3d.networks.unetr:UNETR", "monai.networks.nets:UNETR", {"feature_size": 16}, True),
    "swin_unetr": Case("medseg3d.networks.swin_unetr:SwinUNETR", "monai.networks.nets:SwinUNETR", {"feature_size": 48}),
}


@dataclass(frozen=True)
class Work:
    """What is asked of every variant."""

    network: str
    size: int = 96
    spatial_dims: int = 3
    out_channels: int = 14
    training: bool = False
    optimizer: bool = True
    device: str = "cpu"
    threads: int = 1
    compile_mode: str = "default"
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (1, 1, *[self.size] * self.spatial_dims)

    def build(self, side: str) -> nn.Module:
        """The network of that side with random weights, in fp32 on the CPU."""
        case = CASES[self.network]
        where = case.monai if side == "monai" else case.ours
        if where is None:
            raise SystemExit(f"MONAI has no peer of {self.network}")
        arguments = {"spatial_dims": self.spatial_dims, "in_channels": 1, "out_channels": self.out_channels}
        if case.takes_img_size:
            arguments["img_size"] = [self.size] * self.spatial_dims
        module, _, name = where.partition(":")
        torch.manual_seed(0)
        return getattr(import_module(module), name)(**{**arguments, **case.arguments, **self.arguments})

    def flops(self) -> int:
        side = "monai" if CASES[self.network].monai else "ours"
        return measuring.count_flops(self.build(side), self.input_shape, backward=self.training)


@dataclass(frozen=True)
class Variant:
    """Whose network, and how it is run."""

    side: str
    precision: str
    flash: bool = False
    channels_last: bool = False
    compile: bool = False

    @classmethod
    def parse(cls, text: str, precision: str) -> Variant:
        side, *options = text.split("+")
        unknown = set(options) - set(OPTIONS)
        if side not in ("monai", "ours") or unknown:
            raise SystemExit(f"a variant is monai or ours and any of {', '.join(OPTIONS)}, joined by +; got {text!r}")
        named = [option for option in options if option in PRECISIONS]
        switches = {name: name in options for name in ("flash", "channels_last", "compile")}
        return cls(side, *(named or [precision]), **switches)

    def __str__(self) -> str:
        switches = [name for name in ("flash", "channels_last", "compile") if getattr(self, name)]
        return " ".join(["MONAI" if self.side == "monai" else "medseg3d", self.precision, *switches])


class Subject:
    """One variant, built and ready: ``run`` is what is timed, ``result`` what is compared first."""

    def __init__(self, work: Work, variant: Variant, state: dict[str, torch.Tensor] | None = None) -> None:
        torch.set_num_threads(work.threads)
        if work.training and variant.precision == "bf16":
            raise SystemExit("training keeps its weights in fp32: use autocast instead of bf16")
        self.work, self.variant = work, variant
        self.network = work.build(variant.side)
        if state is not None:
            self.network.load_state_dict(state, strict=True)
        if variant.flash:
            switch_flash_on(self.network)
        self.network.train(work.training)
        for module in self.network.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.eval()
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(work.input_shape, generator=generator)
        target_shape = (1, *work.input_shape[2:])
        self.target = torch.randint(work.out_channels, target_shape, generator=generator).to(work.device)
        dtype = torch.bfloat16 if variant.precision == "bf16" else torch.float32
        layout = CHANNELS_LAST[work.spatial_dims] if variant.channels_last else torch.contiguous_format
        layout_of_weights = layout if variant.channels_last else torch.preserve_format
        self.network.to(work.device, dtype, memory_format=layout_of_weights)
        self.x = x.to(work.device, dtype).contiguous(memory_format=layout)
        self.call = torch.compile(self.network, mode=work.compile_mode) if variant.compile else self.network
        self.optimizer = torch.optim.AdamW(self.network.parameters()) if work.training and work.optimizer else None

    @property
    def run(self) -> Callable[[], object]:
        return self._step if self.work.training else self._infer

    def _forward(self) -> torch.Tensor:
        with torch.autocast(self.work.device, torch.bfloat16, enabled=self.variant.precision == "autocast"):
            return self.call(self.x)

    def _infer(self) -> torch.Tensor:
        with torch.inference_mode():
            return self._forward()

    def _backward(self) -> None:
        F.cross_entropy(self._forward().float(), self.target).backward()

    def _step(self) -> None:
        self._backward()
        if self.optimizer is not None:
            self.optimizer.step()
        self.network.zero_grad(set_to_none=True)

    def result(self) -> torch.Tensor:
        """Logits, or all gradients as one vector in the order of the parameters' names."""
        if not self.work.training:
            return self._infer().float().cpu()
        self._backward()
        parameters = sorted(self.network.named_parameters(), key=lambda item: item[0])
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for _, p in parameters]
        vector = torch.cat([gradient.flatten().float().cpu() for gradient in gradients])
        self.network.zero_grad(set_to_none=True)
        return vector


def switch_flash_on(network: nn.Module) -> None:
    """What ``use_flash_attention=True`` does; MONAI's UNETR does not pass that keyword on to its ViT."""
    attentions = [module for module in network.modules() if hasattr(module, "use_flash_attention")]
    if not attentions:
        raise SystemExit(f"{type(network).__name__} has no use_flash_attention to switch on")
    for module in attentions:
        module.use_flash_attention = True


def memory_of(work: Work, variant: Variant) -> measuring.Memory:
    subject = Subject(work, variant)
    return measuring.peak_memory(subject.run, torch.device(work.device), variant.compile)


@dataclass
class Row:
    """What was found about one variant, or about the matrix product."""

    flops: int
    result: str = ""
    first_call: str = ""
    seconds: list[float] = field(default_factory=list)
    memory: measuring.Memory | None = None


def check(subject: Subject, reference: torch.Tensor, flops: int) -> Row:
    """The first call, timed apart, and its result against the reference; ends the program where they differ."""
    results: list[torch.Tensor] = []
    first_call = measuring.seconds_of(lambda: results.append(subject.result()), torch.device(subject.work.device))
    error = ((results[0] - reference).norm() / reference.norm()).item()
    limits = LARGEST_GRADIENT_ERROR if subject.work.training else LARGEST_ERROR
    if not error <= limits[subject.variant.precision]:
        raise SystemExit(f"{subject.variant} gives other numbers than MONAI in fp32: relative error {error:.2g}")
    text = f"{error:.1e}"
    if not subject.work.training:
        text += f", {(results[0].argmax(1) == reference.argmax(1)).float().mean().item():.2%}"
    return Row(flops, text, f"{first_call:.1f}")


def measure(work: Work, variants: list[Variant], rounds: int, reference_side: str = "monai") -> dict[str, Row]:
    """Every variant checked against the reference in fp32, then timed in turns with a matrix product."""
    device = torch.device(work.device)
    flops = work.flops()
    state = work.build(reference_side).state_dict()
    reference = Subject(work, Variant(reference_side, "fp32"), state).result()
    for side in {variant.side for variant in variants} - {reference_side}:
        note(f"{side} in fp32: {check(Subject(work, Variant(side, 'fp32'), state), reference, flops).result}")
    rows: dict[str, Row] = {}
    runs: dict[str, Callable[[], object]] = {}
    for variant in variants:
        subject = Subject(work, variant, state)
        rows[str(variant)], runs[str(variant)] = check(subject, reference, flops), subject.run
        note(f"{variant}: {rows[str(variant)].result}")
        subject.run()
    for precision in ("fp32", "bf16"):
        runs[product := f"matrix product {precision}"], product_flops = measuring.matmul(PRECISIONS[precision], device)
        rows[product] = Row(product_flops)
        runs[product]()
    for name, seconds in measuring.take_turns(runs, rounds, device, calls=10).items():
        rows[name].seconds = seconds
        note(f"{name}: {duration(median(seconds))} s")
    return rows


def share(row: Row, precision: str, rows: dict[str, Row]) -> float:
    """The rate of a row over that of the matrix product in the same precision, round by round."""
    product = rows[f"matrix product {'fp32' if precision == 'fp32' else 'bf16'}"]
    return row.flops / product.flops * measuring.median_ratio(product.seconds, row.seconds)


def compare(work: Work, variants: list[Variant], rounds: int, with_memory: bool) -> None:
    """Print the variants of one network side by side."""
    rows = measure(work, variants, rounds)
    by_name = {str(variant): variant for variant in variants}
    if with_memory:
        for name, variant in by_name.items():
            rows[name].memory = measuring.in_child(memory_of, work, variant)
    bases = [name for name, variant in by_name.items() if variant.side == "ours"] or list(by_name)[:1]
    result = "error of gradients" if work.training else "error of logits, same argmax"
    header = ["", result, "first call s", "median s", "least to most", *(f"time / {base}" for base in bases)]
    print_header([*header, "window MiB", "process MiB", "GFLOP", "GFLOP/s", "of matrix product"])
    for name, row in rows.items():
        cells = [name, row.result, row.first_call, duration(median(row.seconds))]
        cells.append(f"{duration(min(row.seconds))} to {duration(max(row.seconds))}")
        known = name in by_name
        cells += [f"{measuring.median_ratio(row.seconds, rows[b].seconds):.2f}" if known else "" for b in bases]
        cells += [f"{row.memory.added:.0f}", f"{row.memory.total:.0f}"] if row.memory else ["", ""]
        cells += [f"{row.flops / 1e9:.0f}", f"{row.flops / median(row.seconds) / 1e9:.0f}"]
        print_row([*cells, f"{share(row, by_name[name].precision, rows):.0%}" if known else ""])


def tabulate(work: Work, rounds: int) -> None:
    """Print parameters, operations, time and memory of every network of ``NETWORKS`` at its usual window."""
    from medseg3d.networks import NETWORKS

    if missing := set(NETWORKS) - {label.split()[0] for label in CASES}:
        raise SystemExit(f"say in CASES how {', '.join(sorted(missing))} is built")
    columns = [f"{precision} {what}" for precision in TABULATED for what in ("s", "window MiB", "of matrix product")]
    print_header(["network", "parameters", "window", "GFLOP", *columns])
    for label in CASES:
        if label.split()[0] not in NETWORKS:
            continue
        work = replace(work, network=label)
        variants = [Variant("ours", precision) for precision in TABULATED]
        rows = measure(work, variants, rounds, reference_side="ours")
        parameters = sum(parameter.numel() for parameter in work.build("ours").parameters())
        window = "x".join(map(str, work.input_shape[2:]))
        cells = [label, f"{parameters:,}", window, f"{rows[str(variants[0])].flops / 1e9:.0f}"]
        for variant in variants:
            row = rows[str(variant)]
            memory = measuring.in_child(memory_of, work, variant)
            cells += [duration(median(row.seconds)), f"{memory.added:.0f}"]
            cells.append(f"{share(row, variant.precision, rows):.0%}")
        print_row(cells)


def duration(seconds: float) -> str:
    return f"{seconds:.4f}" if seconds < 0.1 else f"{seconds:.3f}"


def print_header(names: list[str]) -> None:
    print_row(names)
    print_row(["---"] * len(names))


def print_row(cells: list[str]) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def default_variants(work: Work, precision: str, compiled: bool) -> list[str]:
    """MONAI as it is by default and with its own best switches, then ours."""
    best = "+flash" if work.network in ("swin_unetr", "unetr") and not work.training else ""
    names = ["monai+fp32", f"monai{best}", f"monai{best}+channels_last", "ours"]
    if compiled:
        names += [f"monai{best}+channels_last+compile", "ours+compile"]
    return [name for name in names if not (precision == "fp32" and name == "monai" and not best)]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("compare", "table"))
    parser.add_argument("network", nargs="?", choices=[name for name, case in CASES.items() if case.monai])
    parser.add_argument("--size", type=int, default=96, help="edge of the window in voxels")
    parser.add_argument("--spatial-dims", type=int, choices=(2, 3), default=3)
    parser.add_argument("--out-channels", type=int, default=14)
    parser.add_argument("--mode", choices=("inference", "training"), default="inference")
    parser.add_argument("--no-optimizer", action="store_true", help="training step without AdamW")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of variants that name none")
    parser.add_argument("--variants", nargs="+", help="the first is what others are compared with")
    parser.add_argument("--compile", action="store_true", help="add compiled variants to the default ones")
    parser.add_argument("--compile-mode", default="default", help="mode of torch.compile")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--allocator", choices=(*measuring.ALLOCATORS, "both"), default="default", help="glibc's")
    parser.add_argument("--arguments", type=json.loads, default={}, help="more keywords of the network, as JSON")
    parser.add_argument("--no-memory", action="store_true", help="skip the processes that measure memory")
    args = parser.parse_args()
    if args.what == "compare" and args.network is None:
        parser.error("compare needs a network")
    return args


def main() -> None:
    args = parse_arguments()
    if args.allocator == "both":
        for allocator in measuring.ALLOCATORS:
            command = [allocator if word == "both" else word for word in sys.argv]
            subprocess.run([sys.executable, *command], check=True)
        return
    measuring.restart_with(args.allocator, args.threads)
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True
    work = Work(
        args.network or "",
        args.size,
        args.spatial_dims,
        args.out_channels,
        training=args.mode == "training",
        optimizer=not args.no_optimizer,
        device=args.device,
        threads=args.threads,
        compile_mode=args.compile_mode,
        arguments=args.arguments,
    )
    print(f"`python {shlex.join(sys.argv)}`\n")
    print(f"{measuring.describe_machine(torch.device(args.device), args.allocator)}, {args.rounds} rounds.\n")
    if args.what == "table":
        tabulate(work, args.rounds)
        return
    names = args.variants or default_variants(work, args.precision, args.compile)
    variants = [Variant.parse(name, args.precision) for name in names]
    compare(work, variants, args.rounds, not args.no_memory)


if __name__ == "__main__":
    main()

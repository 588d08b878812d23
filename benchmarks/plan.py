"""What `medseg3d predict --plan` says, against what a run then takes: seconds and peak memory.

    python benchmarks/plan.py SCAN ... [--model BUNDLE ...] [--options=--mirror ...] [--clock cpu|wall]

Each plan and each run is a process of its own. Both count from the scan's file to that of its labels; neither counts
the start of Python and the loading of the model. With one thread the processor's clock tells on a busy machine what a
clock on the wall tells on an idle one, but for what waits for a disk.
"""

from __future__ import annotations

import argparse
import gc
import shlex
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measuring import describe_machine, in_child, restart_with

GIB = 2**30
DEFAULT_OPTIONS = ("--precision fp32", "--precision bf16", "--precision auto")


@dataclass(frozen=True)
class Took:
    """Seconds, GiB at the peak, and seconds by stage."""

    seconds: float
    peak: float
    stages: dict[str, float]
    about: str = ""


def planned(scan: str, model: str, options: str, clock: str) -> Took:
    """What the plan says, in this process."""
    segmenter = _loaded(model, options, clock)
    plan = segmenter.plan(segmenter.read(scan))
    return Took(plan.seconds, plan.ram / GIB, dict(plan.stages), f"{type(plan.strategy).__name__}, {plan.windows}")


def taken(scan: str, model: str, options: str, clock: str) -> Took:
    """What a run takes, in this process."""
    from medseg3d.report.run import peak_memory_mb

    segmenter = _loaded(model, options, clock)
    start = time.perf_counter()
    result = segmenter.predict(scan)
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        result.save(Path(folder) / "labels.nii.gz")
        end = time.perf_counter()
    peak = peak_memory_mb()
    assert peak is not None
    stages = {**result.seconds, "write": end - begin}
    return Took(end - start, peak / 1024, stages, "x".join(map(str, result.image.shape)))


def _loaded(model: str, options: str, clock: str) -> Any:
    if clock == "cpu":
        time.perf_counter = time.process_time
    from medseg3d import load_model
    from medseg3d.cli import _parser
    from medseg3d.cli.predicting import HOW

    args = _parser().parse_args(["predict", "-i", "scan", *shlex.split(options)])
    segmenter = load_model(model, device="cpu", trust=True, **{name: getattr(args, name) for name in HOW})
    gc.collect()
    return segmenter


def row(scan: str, model: str, options: str, clock: str, stages: bool) -> str:
    """A line of the table."""
    plan, run = (in_child(function, scan, model, options, clock) for function in (planned, taken))
    if stages:
        for name in {**plan.stages, **run.stages}:
            print(f"    {name:12} {plan.stages.get(name, 0):8.2f} {run.stages.get(name, 0):8.2f}", flush=True)
    cells = [Path(scan).name.split(".")[0], run.about, Path(model).name, f"`{options}`", plan.about]
    cells += [f"{plan.seconds:.1f}", f"{run.seconds:.1f}", f"**{plan.seconds / run.seconds:.2f}**"]
    cells += [f"{plan.peak:.2f}", f"{run.peak:.2f}", f"**{plan.peak / run.peak:.2f}**"]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scans", nargs="+", help="files or DICOM folders")
    parser.add_argument("--model", nargs="+", default=["headneck_ct_unet"], help="names or folders of bundles")
    parser.add_argument("--options", action="append", help="of medseg3d predict, such as --options='--mirror'; repeat")
    parser.add_argument("--clock", choices=("cpu", "wall"), default="wall", help="(default: wall)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--stages", action="store_true", help="print each stage too, as planned and as taken")
    args = parser.parse_args()
    restart_with("default", args.threads)
    import torch

    print(f"{describe_machine(torch.device('cpu'), 'default')}; {args.clock} clock\n")
    print(
        "| scan | voxels | model | options | windows | s planned | s taken | ratio | GiB planned | GiB taken | ratio |"
    )
    print("|---" * 11 + "|")
    for model in args.model:
        for scan in args.scans:
            for options in args.options or DEFAULT_OPTIONS:
                print(row(scan, model, options, args.clock, args.stages), flush=True)


if __name__ == "__main__":
    main()

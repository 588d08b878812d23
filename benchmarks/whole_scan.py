"""A whole CT of 25 classes, .nii.gz in and .nii.gz out: `medseg3d predict` against `monai.bundle run`.

    python benchmarks/whole_scan.py [--shape 512 512 300] [--spacing 1.5] [--threads 2] [--rounds 1] [--folder KEPT]

Each side is a process of its own, from its start to its end, on one bundle in the order of MONAI's zoo: windows of
96^3 that overlap by half, softmax, back to the scan's grid, argmax. Both run the same U-Net, trained here for a few
steps on a phantom whose organs differ in density. Labels are compared before times are printed, with how many there are
and how much is not background: where there is little of it medseg3d has little to interpolate, and MONAI no less.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import nibabel as nib
import numpy as np
import torch
from measuring import describe_machine, in_child
from scipy import ndimage
from torch import nn
from torch.nn import functional as F

from medseg3d.networks import UNet

CLASSES = 25
VOXEL_MM = (0.8, 0.8, 1.5)
HU = (-1000.0, 1000.0)  # what the network sees as 0 to 1
NETWORK = {"out_channels": CLASSES, "channels": [16, 32, 64, 128], "bias": False, "halve_upconv": True}


def phantom(shape: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A CT (D, H, W) int16 and its labels uint8: a body in which 24 ellipsoids differ by 50 HU; noise of 15 HU.

    Where the scan goes on, the ellipsoids begin again, so that long scans are as full as short ones.
    """
    grid = np.ogrid[tuple(slice(-1, 1, n * 1j) for n in shape)]
    body = sum(g.astype(np.float32) ** 2 for g in grid[:2]) < 0.8
    labels = np.zeros(shape, np.uint8)
    cells = np.indices((4, 3, 2)).reshape(3, -1).T
    for number, cell in enumerate(np.random.default_rng(seed).permutation(cells), start=1):
        centre = (cell + 0.5) / (4, 3, 2) * 1.3 - (0.65, 0.65, 0.65)
        axes = zip(grid, centre, (0.13, 0.18, 0.28), strict=True)
        labels[sum(((g - c) / r).astype(np.float32) ** 2 for g, c, r in axes) < 1] = number
    inside = np.where(labels, 50.0 * labels.astype(np.float32) - 550, -700)
    ct = np.where(np.broadcast_to(body, shape), inside, -1000)
    noise = np.random.default_rng(seed + 1).standard_normal(shape, np.float32)
    return (ndimage.gaussian_filter(ct, 0.7) + 15 * noise).astype(np.int16), labels


def write_bundle(folder: Path, spacing: float, steps: int) -> None:
    """A bundle in the order of MONAI's model zoo, and its weights after some steps of training."""
    configs, models = folder / "configs", folder / "models"
    configs.mkdir(parents=True)
    models.mkdir()
    channels = {str(n): "background" if n == 0 else f"organ {n}" for n in range(CLASSES)}
    formats = {
        "inputs": {"image": {"format": "hounsfield", "num_channels": 1}},
        "outputs": {"pred": {"format": "segmentation", "num_channels": CLASSES, "channel_def": channels}},
    }
    metadata = {"version": "1", "monai_version": "1.6.1", "network_data_format": formats}
    (configs / "metadata.json").write_text(json.dumps(metadata))
    (configs / "inference.json").write_text(json.dumps(inference_config(spacing)))
    torch.manual_seed(0)
    torch.save(train(UNet(**NETWORK), steps).state_dict(), models / "model.pt")


def inference_config(spacing: float) -> dict[str, Any]:
    image, pred = {"keys": "image"}, {"keys": "pred"}
    preprocessing = [
        {"_target_": "LoadImaged", **image},
        {"_target_": "EnsureChannelFirstd", **image},
        {"_target_": "Orientationd", **image, "axcodes": "RAS"},
        {"_target_": "Spacingd", **image, "pixdim": [spacing] * 3, "mode": "bilinear"},
        {"_target_": "ScaleIntensityRanged", **image, "a_min": HU[0], "a_max": HU[1], "b_min": 0, "b_max": 1,
         "clip": True},
        {"_target_": "EnsureTyped", **image},
    ]  # fmt: skip
    postprocessing = [
        {"_target_": "Activationsd", **pred, "softmax": True},
        {"_target_": "Invertd", **pred, "transform": "@preprocessing", "orig_keys": "image", "nearest_interp": False,
         "to_tensor": True},
        {"_target_": "AsDiscreted", **pred, "argmax": True},
        {"_target_": "SaveImaged", **pred, "output_dir": "@output_dir", "output_ext": ".nii.gz",
         "output_dtype": "$np.uint8", "output_postfix": "seg", "separate_folder": False},
    ]  # fmt: skip
    return {
        "imports": ["$import numpy as np"],
        "scan": "ct.nii.gz",
        "output_dir": ".",
        "precision": "auto",  # which MONAI does not know
        "device": "$torch.device('cpu')",
        "network_def": {"_target_": "medseg3d.networks.UNet", **NETWORK},
        "network": "$@network_def.to(@device)",
        "preprocessing": {"_target_": "Compose", "transforms": preprocessing},
        "dataset": {"_target_": "Dataset", "data": "$[{'image': @scan}]", "transform": "@preprocessing"},
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "num_workers": 0},
        "inferer": {"_target_": "SlidingWindowInferer", "roi_size": [96] * 3, "sw_batch_size": 4, "overlap": 0.5},
        "postprocessing": {"_target_": "Compose", "transforms": postprocessing},
        "handlers": [
            {"_target_": "CheckpointLoader", "load_path": "$@bundle_root + '/models/model.pt'",
             "load_dict": {"model": "@network"}}
        ],
        "evaluator": {
            "_target_": "SupervisedEvaluator", "device": "@device", "val_data_loader": "@dataloader",
            "network": "@network", "inferer": "@inferer", "postprocessing": "@postprocessing",
            "val_handlers": "@handlers",
        },
        "run": ["$@evaluator.run()"],
    }  # fmt: skip


def train(network: nn.Module, steps: int) -> nn.Module:
    """Some steps on cubes of 32 voxels of a small phantom."""
    ct, labels = phantom((160, 160, 160))
    image, truth = (torch.from_numpy(array) for array in ((ct - HU[0]) / (HU[1] - HU[0]), labels.astype(np.int64)))
    network.train()
    optimizer = torch.optim.Adam(network.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    draw = np.random.default_rng(0)
    for _ in range(steps):
        boxes = [tuple(slice(a, a + 32) for a in draw.integers(0, 128, 3)) for _ in range(4)]
        x = torch.stack([image[box] for box in boxes])[:, None].float().clamp(0, 1)
        loss = F.cross_entropy(network(x), torch.stack([truth[box] for box in boxes]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


def write_scan(folder: Path, shape: tuple[int, ...]) -> None:
    """ct.nii.gz and its true labels, truth.nii.gz."""
    ct, labels = phantom(shape)
    affine = np.diag([*VOXEL_MM, 1.0])
    nib.save(nib.Nifti1Image(ct, affine), folder / "ct.nii.gz")
    nib.save(nib.Nifti1Image(labels, affine), folder / "truth.nii.gz")


def prepare(folder: Path, shape: tuple[int, ...], spacing: float, steps: int) -> None:
    """The scan and the bundle. To be made in another process: a child starts with the peak memory of its parent."""
    write_scan(folder, shape)
    write_bundle(folder / "bundle", spacing, steps)


@dataclass(frozen=True)
class Taken:
    """What one process took: wall seconds, CPU seconds of all its threads, and GiB of memory at its peak."""

    wall: float
    cpu: float
    peak: float


def process(command: list[str], threads: int, log: Path) -> Taken:
    """Run a command to its end. RuntimeError with the end of its log unless that was a good one."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    start = time.perf_counter()
    with log.open("w") as sink:
        child = subprocess.Popen(command, stdout=sink, stderr=sink, env=environment)
        _, status, used = os.wait4(child.pid, 0)
    wall = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {child.returncode}:\n{log.read_text()[-2000:]}")
    return Taken(wall, used.ru_utime + used.ru_stime, used.ru_maxrss / 2**20)


def sides(folder: Path) -> dict[str, tuple[list[str], Path]]:
    """By name: the command, and the file it writes."""
    ct, bundle = str(folder / "ct.nii.gz"), str(folder / "bundle")
    monai = [sys.executable, "-m", "monai.bundle", "run", "--config_file", f"{bundle}/configs/inference.json"]
    monai += ["--bundle_root", bundle, "--scan", ct, "--output_dir", str(folder)]
    found = {"monai.bundle run": (monai, folder / "ct_seg.nii.gz")}
    for precision in ("fp32", "auto"):
        out = folder / f"{precision}.nii.gz"
        ours = [sys.executable, "-m", "medseg3d", "predict", "-i", ct, "-o", str(out), "-m", bundle, "--trust"]
        ours += ["--device", "cpu", "--precision", precision, "--report", str(folder / f"{precision}.json")]
        found[f"medseg3d predict, {precision}"] = ours, out
    return found


def agreement(found: Path, expected: Path) -> tuple[float, float, int, float]:
    """Share of equal voxels, lowest Dice of a label that either has; how many ``found`` has, and its foreground."""
    a, b = (np.asanyarray(nib.load(path).dataobj) for path in (found, expected))
    dice = []
    for number in np.union1d(np.unique(a), np.unique(b)):
        of_a, of_b = a == number, b == number
        dice.append(2 * np.count_nonzero(of_a & of_b) / (np.count_nonzero(of_a) + np.count_nonzero(of_b)))
    return float((a == b).mean()), min(dice), len(np.unique(a)), float((a != 0).mean())


def print_agreement(outputs: dict[str, Path], truth: Path) -> None:
    reference = next(iter(outputs))
    print("\n| labels of | labels | not background | against | equal voxels | lowest Dice |\n|---|---|---|---|---|---|")
    for name, path in outputs.items():
        against = {"the phantom's own": truth} if name == reference else {reference: outputs[reference]}
        for other, expected in against.items():
            equal, dice, count, share = in_child(agreement, path, expected)
            print(f"| {name} | {count} | {100 * share:.3f} % | {other} | {100 * equal:.4f} % | {dice:.4f} |")


def print_times(taken: dict[str, list[Taken]]) -> None:
    base = next(iter(taken.values()))
    print("\n| process | s | x less | CPU s | x less | peak GiB | x less |\n|---|---|---|---|---|---|---|")
    for name, rounds in taken.items():
        cells = []
        for field in ("wall", "cpu", "peak"):
            own = [getattr(one, field) for one in rounds]
            ratio = median(getattr(b, field) / value for b, value in zip(base, own, strict=True))
            cells += [f"{median(own):.1f}" if field != "peak" else f"{median(own):.2f}", f"{ratio:.2f}"]
        print(f"| {name} | {' | '.join(cells)} |")


def print_stages(report: Path) -> None:
    """Of the last round: stages of the run and of its case; imports, and the end of the process, are not in them."""
    run = json.loads(report.read_text())
    seconds = {**run["seconds"], **run["cases"][0]["seconds"]}
    stages = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items() if name != "cases")
    print(f"\n{report.stem}, {run['options']['precision']}: seconds of {stages}")


def compare(folder: Path, threads: int, rounds: int, only: list[str]) -> None:
    chosen = {name: side for name, side in sides(folder).items() if any(word in name for word in only)}
    taken: dict[str, list[Taken]] = {name: [] for name in chosen}
    for _ in range(rounds):
        for name, (command, _) in chosen.items():
            taken[name].append(process(command, threads, folder / "log.txt"))
            print(f"{name}: {taken[name][-1]}", file=sys.stderr, flush=True)
    print_agreement({name: out for name, (_, out) in chosen.items()}, folder / "truth.nii.gz")
    print_times(taken)
    for name, (_, out) in chosen.items():
        if name.startswith("medseg3d"):
            print_stages(folder / f"{out.name.split('.')[0]}.json")


def argument_parser(description: str, kept: str) -> argparse.ArgumentParser:
    """What both benchmarks of whole scans take; ``kept`` names what stays in the folder."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--shape", type=int, nargs=3, default=(512, 512, 300))
    parser.add_argument("--spacing", type=float, default=1.5, help="of the network's grid, mm")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=100, help="of training")
    parser.add_argument("--folder", type=Path, help=f"where {kept} stay, for the next time (default: nowhere)")
    return parser


@contextmanager
def working_folder(args: argparse.Namespace) -> Iterator[Path]:
    """Tell what is measured on which machine; then the folder for it."""
    torch.set_num_threads(args.threads)
    print(f"{tuple(args.shape)} of {VOXEL_MM} mm, network's grid {args.spacing} mm, {args.rounds} rounds; load "
          f"{os.getloadavg()[0]:.1f}; {describe_machine(torch.device('cpu'), 'default')}")  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        yield folder


def main() -> None:
    parser = argument_parser(__doc__, "scan and bundle")
    parser.add_argument("--only", nargs="+", default=["monai", "fp32", "auto"])
    args = parser.parse_args()
    with working_folder(args) as folder:
        if not (folder / "bundle").exists():
            in_child(prepare, folder, tuple(args.shape), args.spacing, args.steps)
        compare(folder, args.threads, args.rounds, args.only)


if __name__ == "__main__":
    main()

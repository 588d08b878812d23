"""Resampling a CT, labels back on its grid, and keeping largest pieces, against SciPy, MONAI and PyTorch.

    python benchmarks/resampling.py [--only cubic linear labels pieces] [--rounds 5] [--scale 1]

Outputs are compared before anything is timed. All sides take turns on one thread; times are medians of CPU seconds, and
ratios medians of the ratios within a round. Peak memory is measured in a process of its own for each side. Data are
synthetic; the label maps and logits have smooth regions, and the share of voxels at their borders is printed.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from functools import cache
from statistics import median

import numpy as np
import torch
from measuring import Run, describe_machine, in_child, median_ratio, peak_memory, restart_with, take_turns
from monai.data import MetaTensor
from monai.transforms import Spacing
from scipy import ndimage
from torch.nn import functional as F

from medseg3d.data.transforms import labels_by_interpolation
from medseg3d.geometry import Geometry
from medseg3d.inference.grid_map import edge_to_edge
from medseg3d.inference.onto_grid import labels_onto
from medseg3d.inference.postprocessing import clean
from medseg3d.inference.slabs import Slab
from medseg3d.interpolation import interpolate

AFFINE = np.diag([0.8, 0.8, 1.5, 1.0])
CPU = torch.device("cpu")
Shape = tuple[int, int, int]


def scaled(shape: Shape, scale: float) -> Shape:
    d, h, w = (max(8, round(n * scale)) for n in shape)
    return d, h, w


def smooth_noise(shape: Shape, seed: int, every: int = 16) -> np.ndarray:
    """float32 in [-3, 3] or so, which changes over ``every`` voxels."""
    coarse = np.random.default_rng(seed).standard_normal([max(2, n // every) for n in shape])
    return interpolate(coarse, shape, order=3)


@cache
def scan(scale: float) -> tuple[np.ndarray, Shape]:
    """int16 HU in Fortran order, as NIfTI stores it, and the shape to bring it to."""
    shape = scaled((512, 512, 300), scale)
    noise = np.random.default_rng(1).standard_normal(shape, np.float32)
    ct = np.clip(400 * smooth_noise(shape, 0) + 15 * noise, -1024, 3000).astype(np.int16)
    return np.asfortranarray(ct), scaled((273, 273, 300), scale)


# Each case makes its data once, then gives its sides by name; the first is ours. All sides give comparable arrays.
def cubic(scale: float) -> dict[str, Run]:
    ct, shape = scan(scale)
    zoom = np.divide(shape, ct.shape)
    return {
        "medseg3d interpolate, order 3": lambda: interpolate(ct, shape, 3),
        "scipy.ndimage.zoom, order 3": lambda: ndimage.zoom(
            ct, zoom, np.float32, order=3, mode="nearest", grid_mode=True
        ),
    }


def linear(scale: float) -> dict[str, Run]:
    """MONAI and SciPy do not filter before they take fewer voxels; PyTorch's antialias is the same sum as ours."""
    ct, shape = scan(scale)
    tensor = torch.from_numpy(ct)
    image = MetaTensor(tensor[None], affine=torch.from_numpy(AFFINE))
    target = np.array(ct.shape) * np.diag(AFFINE)[:3] / shape
    in_dtype = {
        dtype: Spacing(target, mode="bilinear", padding_mode="border", dtype=dtype)
        for dtype in (np.float64, np.float32)
    }

    def antialiased() -> np.ndarray:
        slices = tensor.permute(2, 0, 1)[:, None].float()
        moved = F.interpolate(slices, shape[:2], mode="bilinear", antialias=True)
        return moved[:, 0].permute(1, 2, 0).numpy()

    return {
        "medseg3d interpolate, order 1": lambda: interpolate(ct, shape, 1),
        "PyTorch bilinear with antialias, slice by slice": antialiased,
        "MONAI Spacing bilinear, in its default float64": lambda: in_dtype[np.float64](image),
        "MONAI Spacing bilinear, in float32": lambda: in_dtype[np.float32](image),
        "scipy.ndimage.zoom, order 1": lambda: ndimage.zoom(
            ct, np.divide(shape, ct.shape), np.float32, order=1, mode="nearest", grid_mode=True
        ),
    }


def labels(scale: float, classes: int = 60, thickness: int = 32) -> dict[str, Run]:
    small, shape = scaled((200, 200, 160), scale), scaled((375, 375, 160), scale)
    logits = torch.empty(classes, *small)
    for number in range(classes):
        logits[number] = torch.from_numpy(smooth_noise(small, number, every=40))
    frame = Geometry(small, np.eye(4)).resample(shape=shape)

    def slabs() -> np.ndarray:
        parts = (Slab(0, n, logits[:, n : n + thickness]) for n in range(0, small[0], thickness))
        return labels_onto(parts, edge_to_edge(small, shape))

    def class_by_class() -> np.ndarray:
        best = F.interpolate(logits[None, :1], shape, mode="trilinear")[0, 0]
        winners = torch.zeros(shape, dtype=torch.uint8)
        for number in range(1, classes):
            moved = F.interpolate(logits[None, number : number + 1], shape, mode="trilinear")[0, 0]
            winners.masked_fill_(moved > best, number)
            torch.maximum(best, moved, out=best)
        return winners.numpy()

    def all_at_once() -> np.ndarray:
        return F.interpolate(logits[None], shape, mode="trilinear")[0].max(0).indices.numpy()

    return {
        "medseg3d labels_onto, slabs of 32 slices": slabs,
        "PyTorch trilinear, class by class, running maximum": class_by_class,
        "PyTorch trilinear, all classes, maximum": all_at_once,
        "medseg3d labels_by_interpolation, class by class": lambda: labels_by_interpolation(frame, logits.numpy()),
    }


def pieces(scale: float, numbers: int = 40) -> dict[str, Run]:
    shape = scaled((273, 273, 300), scale)
    field = smooth_noise(shape, 0)
    bounds = np.quantile(field[::4, ::4, ::4], np.linspace(0.45, 1, numbers + 1)[:-1])
    label_map = np.searchsorted(bounds, field).astype(np.uint8)
    rng = np.random.default_rng(0)
    specks = rng.random(shape) < 5e-4
    label_map[specks] = rng.integers(1, numbers + 1, specks.sum())

    def by_scipy() -> np.ndarray:
        result = np.zeros_like(label_map)
        for number in range(1, numbers + 1):
            found, count = ndimage.label(label_map == number, structure=np.ones((3, 3, 3)))
            if count:
                sizes = np.bincount(found.ravel())
                sizes[0] = 0
                result[found == sizes.argmax()] = number
        return result

    return {
        "medseg3d clean(min_share=1)": lambda: clean(label_map, (1.5, 1.5, 1.5), min_share=1),
        "scipy.ndimage.label, label by label": by_scipy,
    }


CASES: dict[str, tuple[Callable[..., dict[str, Run]], str]] = {
    "cubic": (cubic, "512x512x300 int16 at 0.8x0.8x1.5 mm to 273x273x300, cubic spline"),
    "linear": (linear, "512x512x300 int16 at 0.8x0.8x1.5 mm to 273x273x300, linear"),
    "labels": (labels, "60 classes of logits 200x200x160 to labels 375x375x160"),
    "pieces": (pieces, "the largest piece of each of 40 labels, 273x273x300"),
}


def agreement(case: str, ours: np.ndarray, others: dict[str, np.ndarray]) -> str:
    """What the outputs have in common, in words; AssertionError where they must be equal and are not."""
    (first, other), *_ = others.items()
    if case in ("cubic", "linear"):
        inner = np.s_[2:-2, 2:-2] if case == "linear" else ...  # at the edges PyTorch leaves out what lies outside
        difference = float(np.abs(np.subtract(ours[inner], other[inner])).max())
        bound = 2e-3 if case == "cubic" else 0.05  # PyTorch rounds positions to float32
        assert difference < bound, f"{difference} HU from {first}"
        where = ", the two outermost voxels aside" if case == "linear" else ""
        return f"largest difference from {first}{where}: {difference:.1e} HU"
    share = max(float((ours != other).mean()) for other in others.values())
    assert share <= (0 if case == "pieces" else 1e-6), f"{share:.2e} of voxels differ"
    border = float(np.mean((np.diff(ours, axis=0) != 0)[:, 1:, 1:] | (np.diff(ours, axis=1) != 0)[1:, :, 1:]))
    return f"voxels that differ from any other side: {share:.1e}; voxels at a border in the plane: {100 * border:.1f} %"


def added_mib(case: str, name: str, scale: float) -> float:
    torch.set_num_threads(1)
    return peak_memory(CASES[case][0](scale)[name], CPU).added


def measure(case: str, rounds: int, scale: float) -> None:
    make, title = CASES[case]
    runs = make(scale)
    results = {name: np.asarray(run()) for name, run in runs.items()}
    own, *_ = runs
    ours = results.pop(own)
    print(f"\n## {title}\n\nOutputs compared: {agreement(case, ours, results)}.")
    del ours, results
    seconds = take_turns(runs, rounds, CPU, clock=time.process_time)
    print("\n| | CPU s | x ours | peak MiB added |\n|---|---|---|---|", flush=True)
    del runs
    for name, values in seconds.items():
        memory = in_child(added_mib, case, name, scale)
        print(
            f"| {name} | {median(values):.3f} | {median_ratio(values, seconds[own]):.1f} | {memory:.0f} |", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="cases to run; by default all")
    parser.add_argument("--rounds", type=int, default=5, help="times that every side takes its turn")
    parser.add_argument("--scale", type=float, default=1.0, help="of all sizes; small ones for a quick look")
    args = parser.parse_args()
    restart_with("default", 1)
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    print(f"{describe_machine(CPU, 'default')}; {args.rounds} rounds, load {load:.1f} at the start")
    for case in args.only:
        measure(case, args.rounds, args.scale)


if __name__ == "__main__":
    main()

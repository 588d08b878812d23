"""Reading and writing compressed NIfTI against nibabel and SimpleITK: medians of interleaved runs, in CPU seconds.

    python benchmarks/nifti_io.py [--shape 512 512 300] [--repeats 5]

The volume is synthetic: smooth soft tissue with noise inside a body, constant air outside, int16. Every reader must
return the same voxels before anything is timed. Writers of medseg3d reopen and compare what they wrote; the others do
not.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from medseg3d.io import read_volume, write_label_map, write_volume
from medseg3d.volume import Volume

AFFINE = np.diag([0.8, 0.8, 1.5, 1.0])


def synthetic_ct(shape: tuple[int, int, int]) -> np.ndarray:
    """int16 (D, H, W) in Fortran order, as NIfTI stores it."""
    rng = np.random.default_rng(0)
    coarse = rng.normal(40, 60, [max(2, n // 32) for n in shape])
    tissue = ndimage.zoom(coarse, [n / c for n, c in zip(shape, coarse.shape, strict=True)], order=1)
    tissue += rng.normal(0, 12, shape)
    x, y, _ = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij", sparse=True)
    body = (x / 0.8) ** 2 + (y / 0.6) ** 2 < 1
    return np.asfortranarray(np.where(body, tissue, -1024).astype(np.int16))


def compare(title: str, runs: dict[str, Callable[[], object]], repeats: int) -> None:
    """Print a table; runs take turns so that a machine's drift meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if turn:  # the first one warms caches up
                seconds[name].append(time.process_time() - start)
    ours = next(name for name in runs if name.startswith("medseg3d"))
    print(f"\n| {title} | CPU s | x ours |\n|---|---|---|")
    for name, values in seconds.items():
        ratio = median(value / own for value, own in zip(values, seconds[ours], strict=True))
        print(f"| {name} | {median(values):.3f} | {ratio:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", type=int, nargs=3, default=(512, 512, 300))
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    array = synthetic_ct(tuple(args.shape))
    labels = np.asfortranarray(np.clip(ndimage.uniform_filter(array, 9) // 40, 0, 7).astype(np.uint8))
    image, label_map = Volume(array, AFFINE), Volume(labels, AFFINE)
    names = {n: f"organ {n}" for n in range(1, 8)}
    print(
        f"{tuple(args.shape)} int16, {platform.processor() or platform.machine()}, nibabel {nib.__version__}, ", end=""
    )
    print(f"SimpleITK {sitk.Version_VersionString()}, {args.repeats} repeats")
    with tempfile.TemporaryDirectory() as folder:
        ct = Path(folder, "ct.nii.gz")
        nib.save(nib.Nifti1Image(array, AFFINE), ct)
        assert np.array_equal(read_volume(ct).array, np.asanyarray(nib.load(ct).dataobj))
        compare(
            "read a CT",
            {
                "medseg3d read_volume": lambda: read_volume(ct),
                "nibabel dataobj (int16)": lambda: np.asanyarray(nib.load(ct).dataobj),
                "nibabel get_fdata (float64)": lambda: nib.load(ct).get_fdata(),
                "SimpleITK ReadImage": lambda: sitk.GetArrayFromImage(sitk.ReadImage(str(ct))),
            },
            args.repeats,
        )
        out = Path(folder, "out.nii.gz")
        itk_image, itk_labels = (sitk.GetImageFromArray(np.ascontiguousarray(a.T)) for a in (array, labels))
        compare(
            "write a CT",
            {
                "medseg3d write_volume, read again and compared": lambda: write_volume(image, out),
                "nibabel save": lambda: nib.save(nib.Nifti1Image(array, AFFINE), out),
                "SimpleITK WriteImage": lambda: sitk.WriteImage(itk_image, str(out), True),
            },
            args.repeats,
        )
        compare(
            "write a label map",
            {
                "medseg3d write_label_map, read again and compared": lambda: write_label_map(label_map, out, names),
                "nibabel save": lambda: nib.save(nib.Nifti1Image(labels, AFFINE), out),
                "SimpleITK WriteImage": lambda: sitk.WriteImage(itk_labels, str(out), True),
            },
            args.repeats,
        )


if __name__ == "__main__":
    main()

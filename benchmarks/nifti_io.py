"""Reading and writing compressed NIfTI against MONAI, nibabel and SimpleITK: medians of interleaved runs.

    python benchmarks/nifti_io.py [--ct SCAN] [--shape 512 512 300] [--repeats 5]

The voxels are those of a CT, the sample that ships with medseg3d unless another is named, mirrored at its borders until
it fills the shape: mirrored, it compresses no better than it is, while a repeated or a resampled image would. Every
reader must return the same voxels before anything is timed. medseg3d's writers flush the file to the disk, read it
again and compare its checksum, header and label names before it gets its name; the others do nothing of the kind.
CPU seconds are those of all threads; medseg3d deflates on up to four.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from statistics import median

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from monai.transforms import LoadImage
from scipy import ndimage

from medseg3d.io import read_volume, write_label_map, write_volume
from medseg3d.volume import Volume

AFFINE = np.diag([0.8, 0.8, 1.5, 1.0])
SAMPLE = resources.files("medseg3d.data.sample") / "headneck_template_ct.nii.gz"


def mirrored(array: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """The array (D, H, W) cut to the shape, or continued by its mirror images; in Fortran order, as NIfTI stores it."""
    missing = [(0, max(0, n - m)) for n, m in zip(shape, array.shape, strict=True)]
    return np.asfortranarray(np.pad(array, missing, mode="symmetric")[tuple(map(slice, shape))])


def compare(title: str, runs: dict[str, Callable[[], object]], repeats: int, file: Path) -> None:
    """Print a table; runs take turns so that a machine's drift meets all alike. `file` is what they read or write."""
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    wall: dict[str, list[float]] = {name: [] for name in runs}
    size = {}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            start = time.process_time(), time.perf_counter()
            run()
            if turn:  # the first one warms caches up
                cpu[name].append(time.process_time() - start[0])
                wall[name].append(time.perf_counter() - start[1])
            size[name] = file.stat().st_size / 1e6
    ours = next(name for name in runs if name.startswith("medseg3d"))
    print(f"\n| {title} | CPU s | x ours | s | x ours | MB |\n|---|---|---|---|---|---|")
    for name in runs:
        cells = [f"{size[name]:.1f}"]
        for seconds in (wall, cpu):
            ratio = median(value / own for value, own in zip(seconds[name], seconds[ours], strict=True))
            cells[:0] = [f"{median(seconds[name]):.3f}", f"{ratio:.2f}"]
        print(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ct", type=Path, default=SAMPLE)
    parser.add_argument("--shape", type=int, nargs=3, default=(512, 512, 300))
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    array = mirrored(read_volume(args.ct).array, tuple(args.shape))
    labels = np.asfortranarray(np.clip(ndimage.uniform_filter(array, 9) // 40, 0, 7).astype(np.uint8))
    image, label_map = Volume(array, AFFINE), Volume(labels, AFFINE)
    names = {n: f"organ {n}" for n in range(1, 8)}
    load = LoadImage(image_only=True)
    versions = f"nibabel {nib.__version__}, SimpleITK {sitk.Version_VersionString()}"
    print(f"{args.ct.name} as {array.shape} {array.dtype}; {platform.machine()}, {os.cpu_count()} cores, load")
    print(f"{os.getloadavg()[0]:.1f}; {versions}, {args.repeats} repeats")
    with tempfile.TemporaryDirectory() as folder:
        ct, out = Path(folder, "ct.nii.gz"), Path(folder, "out.nii.gz")
        nib.save(nib.Nifti1Image(array, AFFINE), ct)
        assert np.array_equal(read_volume(ct).array, array)
        assert np.array_equal(load(ct).numpy(), array)
        readers = {
            "medseg3d read_volume": lambda: read_volume(ct),
            "nibabel dataobj (int16)": lambda: np.asanyarray(nib.load(ct).dataobj),
            "nibabel get_fdata (float64)": lambda: nib.load(ct).get_fdata(),
            "SimpleITK ReadImage": lambda: sitk.GetArrayFromImage(sitk.ReadImage(str(ct))),
            "MONAI LoadImage (float32)": lambda: load(ct),
        }
        compare("read a CT", readers, args.repeats, ct)
        itk_image, itk_labels = (sitk.GetImageFromArray(np.ascontiguousarray(a.T)) for a in (array, labels))
        writers = {
            "medseg3d write_volume": lambda: write_volume(image, out),
            "nibabel save": lambda: nib.save(nib.Nifti1Image(array, AFFINE), out),
            "SimpleITK WriteImage": lambda: sitk.WriteImage(itk_image, str(out), True),
        }
        compare("write a CT", writers, args.repeats, out)
        assert np.array_equal(read_volume(write_volume(image, out)).array, array)
        writers = {
            "medseg3d write_label_map": lambda: write_label_map(label_map, out, names),
            "nibabel save": lambda: nib.save(nib.Nifti1Image(labels, AFFINE), out),
            "SimpleITK WriteImage": lambda: sitk.WriteImage(itk_labels, str(out), True),
        }
        compare("write a label map", writers, args.repeats, out)


if __name__ == "__main__":
    main()

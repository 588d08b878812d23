"""The CSV files of the OpenKBP challenge as NIfTI files, those of the manifest openkbp_headneck, byte for byte.

    git clone https://github.com/ababier/open-kbp
    python scripts/convert_openkbp.py open-kbp -o data

Two files of 128 x 128 x 128 voxels a case: the CT in HU and a label map of the seven organs. A case that is there
already, with the manifest's checksums, is left alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import nibabel as nib
import numpy as np

from medseg3d.data.manifest import load_manifest, manifest_cases
from medseg3d.io.atomic import write_atomic
from medseg3d.io.digest import file_sha256

SHAPE = (128, 128, 128)  # rows from front to back, columns from right to left, slices from head to feet
FILES = {
    "brainstem": "Brainstem",
    "spinal_cord": "SpinalCord",
    "parotid_right": "RightParotid",
    "parotid_left": "LeftParotid",
    "esophagus": "Esophagus",
    "larynx": "Larynx",
    "mandible": "Mandible",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("source", type=Path, help="a clone of the challenge's repository, with provided-data/")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the folder for --dataset-dir")
    args = parser.parse_args()
    manifest = load_manifest("openkbp_headneck")
    cases, others = manifest_cases(manifest), 0
    for number, case in enumerate(cases, start=1):
        others += not convert_case(case, manifest["labels"], args.source, args.output)
        print(f"\r{number} of {len(cases)} cases", end="", flush=True)
    print()
    if others:
        print(f"{others} of them have other checksums than the manifest: another release of the data, or of zlib")


def convert_case(case: dict[str, str], labels: dict[str, str], source: Path, output: Path) -> bool:
    """Write the two files of a case of the manifest; whether they have its checksums."""
    image, label = output / case["image"], output / case["label"]
    if _is(image, case["image_sha256"]) and _is(label, case["label_sha256"]):
        return True
    folder = source / "provided-data" / f"{case['split']}-pats" / case["patient"].replace("pt", "pt_")
    if not (folder / "ct.csv").is_file():
        raise SystemExit(f"{folder / 'ct.csv'} is missing: the first argument is a whole clone of ababier/open-kbp")
    spacing = np.loadtxt(folder / "voxel_dimensions.csv")
    indices, values = np.loadtxt(folder / "ct.csv", delimiter=",", skiprows=1, ndmin=2).T
    ct = np.zeros(SHAPE)
    ct.flat[indices.astype(int)] = values
    organs = np.zeros(SHAPE, np.uint8)
    for number, name in sorted(labels.items(), reverse=True):  # where two overlap the lower number stays
        file = folder / f"{FILES.get(name)}.csv"
        if file.is_file():
            organs.flat[np.loadtxt(file, delimiter=",", skiprows=1, usecols=0, dtype=int, ndmin=1)] = int(number)
    write(image, (np.clip(ct, 0, 4095) - 1000).astype(np.int16), spacing)
    write(label, organs, spacing)
    return _is(image, case["image_sha256"]) and _is(label, case["label_sha256"])


def write(path: Path, voxels: np.ndarray, spacing: np.ndarray) -> None:
    """Write an array (rows, columns, slices) with the origin in its middle."""
    axes = spacing * [-1, -1, 1]  # the file's axes run to the left, to the back and to the head
    affine = np.diag([*axes, 1.0])
    affine[:3, 3] = -axes * (np.array(SHAPE) - 1) / 2
    image = nib.Nifti1Image(voxels[:, :, ::-1].transpose(1, 0, 2), affine)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = b"OpenKBP head-neck, converted"
    image.set_qform(affine, 1)
    image.set_sform(affine, 1)
    write_atomic(path, lambda temporary: nib.save(image, temporary))


def _is(path: Path, sha256: str) -> bool:
    return path.is_file() and file_sha256(path) == sha256


if __name__ == "__main__":
    main()

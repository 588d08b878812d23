"""One label map a case from binary masks, a file an organ, as the data sets of TotalSegmentator come.

    python scripts/merge_masks.py Totalsegmentator_dataset_v201 -o merged --organs liver spleen kidney_left kidney_right
    medseg3d check merged/datalist.json
    medseg3d adapt merged/datalist.json -o abdomen_ct_unet
    medseg3d train -m abdomen_ct_unet --trust -o runs/first

A case is a folder with ct.nii.gz and segmentations/ORGAN.nii.gz. An organ without a file was not looked for, one whose
file is empty is not in the scan. Where organs overlap, the voxel is the first one's. The column split of a meta.csv
says what is for training, validation and test. Images stay where they are.
"""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

import medseg3d as ms
from medseg3d.data.datasets import Case, Dataset, write_datalist
from medseg3d.data.manifest import load_manifest
from medseg3d.io import read_geometry

MASK = ".nii.gz"
SPLITS = {"train": "train", "val": "validation", "test": "test"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("    python")[0], epilog=__doc__.rpartition("\n\n")[2]
    )
    parser.add_argument("folder", type=Path, help="holds a folder for each case")
    parser.add_argument("-o", "--output", type=Path, required=True, help="gets labels/ and datalist.json")
    parser.add_argument("--organs", nargs="+", help="those that are wanted, numbered from 1; all by default")
    parser.add_argument(
        "--manifest", help="whose numbers the organs get, such as totalsegmentator_v2; else they go by name"
    )
    args = parser.parse_args()
    if args.organs and args.manifest:
        parser.error("--organs numbers them itself: leave --manifest out")
    folders = sorted(
        path.parent for path in args.folder.glob("*/segmentations") if (path.parent / "ct.nii.gz").is_file()
    )
    try:
        labels = labels_of(folders, args.organs, load_manifest(args.manifest)["labels"] if args.manifest else None)
        splits = splits_of(args.folder / "meta.csv")
        cases, twice = [], 0
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for folder, (annotated, overlap) in zip(
                folders, pool.map(partial(write_merged, labels=labels, output=args.output), folders), strict=True
            ):
                twice += overlap
                cases.append(_case(folder, args.output, annotated, splits))
                print(f"\r{len(cases)} of {len(folders)} cases", end="", flush=True)
        dataset = Dataset(args.folder.resolve().name, args.folder, tuple(cases), labels)
        print(f"\n{write_datalist(dataset, args.output / 'datalist.json')}: {twice} voxels were of several organs")
    except (ValueError, OSError) as error:
        parser.error(str(error))


def labels_of(
    folders: Sequence[Path], organs: Sequence[str] | None = None, numbered: Mapping[str, str] | None = None
) -> dict[int, str]:
    """Number -> name, the background too: of the ``organs`` in their order, as ``numbered``, or of all by their names.

    Raises:
        ValueError: there is no case, or an organ has no mask in any.
    """
    found = {mask.name.removesuffix(MASK) for folder in folders for mask in (folder / "segmentations").glob(f"*{MASK}")}
    if not found:
        raise ValueError("there is no case: a folder with ct.nii.gz and segmentations/ORGAN.nii.gz")
    if missing := sorted(set(organs or ()) - found):
        raise ValueError(f"no case has a mask of {', '.join(missing)}; there are {', '.join(sorted(found))}")
    if numbered is not None:
        return {int(number): name for number, name in numbered.items()}
    return {0: "background", **dict(enumerate(organs or sorted(found), start=1))}


def write_merged(folder: Path, labels: Mapping[int, str], output: Path) -> tuple[tuple[int, ...], int]:
    """Write labels/CASE.nii.gz; the labels that were looked for, and how many voxels are of several organs.

    Raises:
        ValueError: a mask does not lie on the scan's grid.
    """
    grid = read_geometry(folder / "ct.nii.gz")
    merged = np.zeros(grid.shape, np.uint8 if max(labels) < 256 else np.uint16, order="F")
    annotated, overlap = [], 0
    for number, name in sorted(labels.items()):
        file = folder / "segmentations" / f"{name}{MASK}"
        if number == 0 or not file.is_file():
            continue
        mask = ms.read_volume(file)
        if not mask.geometry.coincides(grid):
            raise ValueError(f"{file} does not lie on the grid of {folder / 'ct.nii.gz'}: resample it first")
        inside, free = mask.array != 0, merged == 0
        overlap += int((inside & ~free).sum())
        merged[inside & free] = number
        annotated.append(number)
    ms.write_label_map(ms.Volume(merged, grid.affine), _merged_file(folder, output), dict(labels))
    return tuple(annotated), overlap


def splits_of(table: Path) -> dict[str, str]:
    """Case -> split from TotalSegmentator's meta.csv; empty if there is none.

    Raises:
        ValueError: a split has another name.
    """
    if not table.is_file():
        return {}
    with table.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file, delimiter=";"))
    if strange := {row.get("split") for row in rows} - SPLITS.keys():
        raise ValueError(f"{table}: a split is one of {', '.join(SPLITS)}, got {', '.join(map(str, strange))}")
    return {row["image_id"]: SPLITS[row["split"]] for row in rows}


def _case(folder: Path, output: Path, annotated: tuple[int, ...], splits: Mapping[str, str]) -> Case:
    image, label = (folder / "ct.nii.gz").absolute(), _merged_file(folder, output).absolute()
    return Case(folder.name, (image,), label, folder.name, splits.get(folder.name, "train"), annotated=annotated)


def _merged_file(folder: Path, output: Path) -> Path:
    return output / "labels" / f"{folder.name}.nii.gz"


if __name__ == "__main__":
    main()

"""A model's own contours for the organs that nobody contoured, so that a network can learn them from more patients.

Only cases to train on are completed, and in them only voxels that the reference leaves to the background and the model
gives to an organ that the case lacks. What was contoured by hand stays; cases for validation and test stay as they are.

    python scripts/complete_labels.py openkbp_headneck --dataset-dir DATA_FOLDER -o completed
    medseg3d train -m headneck_ct_unet --data completed/datalist.json -o RUN_FOLDER
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import medseg3d as ms
from medseg3d.data.datasets import Case, write_datalist
from medseg3d.data.manifest import dataset_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("data", help="a manifest or datalist that says which labels each case has (contoured)")
    parser.add_argument("--dataset-dir", help="the folder that its paths start from")
    parser.add_argument("-o", "--output", type=Path, required=True, help="gets labels/ and datalist.json")
    parser.add_argument("--model", default="headneck_ct_unet")
    parser.add_argument("--weights", help="weights of that model's network; its own by default")
    parser.add_argument("--mirror", action="store_true", help="average with the mirrored scan: a little better")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    dataset = dataset_of(args.data, args.dataset_dir)
    model = ms.load_model(args.model, args.device, weights=args.weights, mirror=args.mirror)
    numbers = {number: _number_in(dataset.labels, name) for number, name in model.labels.items()}
    cases, voxels = [], 0
    for number, case in enumerate(dataset.cases, start=1):
        missing = _missing(case, numbers)
        if missing:
            completed, added = complete(case, model, missing)
            path = ms.write_label_map(completed, args.output / "labels" / f"{case.name}.nii.gz", dataset.labels)
            annotated = tuple(sorted({*case.annotated, *missing.values()}))
            case = dataclasses.replace(case, label=path.absolute(), annotated=annotated)
            voxels += added
        cases.append(case)
        print(f"\r{number} of {len(dataset.cases)} cases", end="", flush=True)
    changed = sum(old is not new for old, new in zip(dataset.cases, cases, strict=True))
    path = write_datalist(dataclasses.replace(dataset, cases=tuple(cases)), args.output / "datalist.json")
    print(f"\n{path}: {changed} of {len(cases)} cases completed, {voxels} voxels added")


def complete(case: Case, model: ms.Segmenter, missing: dict[int, int]) -> tuple[ms.Volume, int]:
    """The case's label map with the organs of ``missing`` (the model's number: the data set's), and the voxels added.

    Raises:
        ValueError: image and label map have different grids.
    """
    image, labels = ms.read_volume(case.images[0]), ms.read_volume(case.label)
    if not image.geometry.coincides(labels.geometry):
        raise ValueError(f"{case.label} does not lie on the grid of {case.images[0]}: resample it first")
    predicted = model.predict(image).segmentation.array
    completed, free = labels.array.copy(), labels.array == 0
    for theirs, ours in missing.items():
        completed[free & (predicted == theirs)] = ours
    return labels.with_array(completed), int((completed != labels.array).sum())


def _missing(case: Case, numbers: dict[int, int | None]) -> dict[int, int]:
    """The labels that the model can add, its number: the data set's."""
    if case.split != "train" or case.label is None or case.annotated is None:
        return {}
    return {theirs: ours for theirs, ours in numbers.items() if ours is not None and ours not in case.annotated}


def _number_in(labels: dict[int, str], name: str) -> int | None:
    return next((number for number, own in labels.items() if own == name and number > 0), None)


if __name__ == "__main__":
    main()

"""Data manifests: what a public data set is and who is in which split, with checksums, licence and citation.

Never images. A manifest without cases describes a set to be fetched by whoever uses it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medseg3d.data.datasets import SPLITS, Case, Dataset, case_names, is_datalist, read_dataset, read_document
from medseg3d.resources import did_you_mean, resource_folder

_REQUIRED = {"name", "labels", "source"}
_REQUIRED_OF_CASES = {"image", "patient", "split"}


def load_manifest(name_or_path: str | Path) -> dict[str, Any]:
    """A manifest by its name ("openkbp_headneck") or by the path of its JSON file.

    Raises:
        FileNotFoundError: no such manifest; the message lists those that ship.
        ValueError: the file is no manifest, a case lacks what it must have, a patient is in two splits, or a split has
            another name than train, validation or test.
    """
    path = Path(name_or_path)
    if path.suffix != ".json":
        folder = resource_folder("data_manifests")
        path = folder / f"{name_or_path}.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no manifest {str(name_or_path)!r}; medseg3d ships {', '.join(shipped_manifests())}"
                + did_you_mean(name_or_path, shipped_manifests())
            )
    manifest = dict(read_document(path))
    if not manifest.keys() >= _REQUIRED:
        raise ValueError(
            f"{path} is no data manifest: it must have {', '.join(sorted(_REQUIRED))}, as schema.json says"
        )
    for key, kind, words in (("source", dict, "an object"), ("labels", dict, "an object"), ("cases", list, "a list")):
        if not isinstance(manifest.get(key, kind()), kind):
            raise ValueError(f"{path.name}: {key!r} is {words}, as schema.json says, got {manifest[key]!r}")
    split_of: dict[str, str] = {}
    for number, case in enumerate(manifest.get("cases", ())):
        if not isinstance(case, dict):
            raise ValueError(f"{path.name}: case {number} (the first is 0) is no object, but {case!r}")
        if missing := _REQUIRED_OF_CASES - case.keys():
            raise ValueError(f"{path.name}: case {number} (the first is 0) has no {', '.join(sorted(missing))}")
        if case["split"] not in SPLITS:
            raise ValueError(f"{path.name}: a split is one of {', '.join(SPLITS)}, got {case['split']!r}")
        if split_of.setdefault(case["patient"], case["split"]) != case["split"]:
            raise ValueError(f"{path.name}: patient {case['patient']} is in two splits, which would leak between them")
    return manifest


def shipped_manifests() -> list[str]:
    """The names of the manifests that ship."""
    return sorted(path.stem for path in resource_folder("data_manifests").glob("*.json") if path.stem != "schema")


def manifest_cases(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The cases of a loaded manifest; ValueError, with the way out, if it only describes a data set."""
    if "cases" not in manifest:
        raise ValueError(
            f"the manifest {manifest['name']} describes a data set and lists no cases; get the images from "
            f"{_source(manifest)} and list them: medseg3d check DIR -o datalist.json --make-folds 5, then give "
            "datalist.json in place of the manifest"
        )
    return manifest["cases"]


def manifest_dataset(manifest: str | Path | Mapping[str, Any], dataset_dir: str | Path) -> Dataset:
    """The data set of a manifest with cases; ValueError as in `manifest_cases`."""
    loaded = manifest if isinstance(manifest, Mapping) else load_manifest(manifest)
    root = Path(dataset_dir)
    listed = manifest_cases(loaded)
    images = [(root / case["image"],) for case in listed]
    names = case_names([""] * len(listed), images, root)
    cases = tuple(
        Case(
            name=name,
            images=files,
            label=root / case["label"] if "label" in case else None,
            patient=case["patient"],
            split=case["split"],
            fold=case.get("fold"),
            annotated=tuple(case["contoured"]) if "contoured" in case else None,
        )
        for case, name, files in zip(listed, names, images, strict=True)
    )
    return Dataset(
        name=loaded["name"],
        root=root,
        cases=cases,
        labels={int(number): name for number, name in sorted(loaded["labels"].items(), key=lambda item: int(item[0]))},
        objects=loaded.get("label_kind") == "objects",
        source=_source(loaded),
    )


def dataset_of(source: str | Path | Mapping[str, Any], dataset_dir: str | Path | None = None) -> Dataset:
    """The data set that a manifest or one's own data stand for.

    Args:
        source: name, path or content of a manifest; or what `read_dataset` takes.
        dataset_dir: the folder that relative paths start from; a manifest needs it.

    Raises:
        FileNotFoundError, ValueError: where `load_manifest` or `read_dataset` do.
    """
    if not isinstance(source, Mapping):
        path = Path(source).expanduser()
        if str(source) not in shipped_manifests() and (
            path.is_dir() or path.suffix.lower() in (".csv", ".tsv") or (path.suffix == ".json" and is_datalist(path))
        ):
            return read_dataset(path, dataset_dir)
        source = load_manifest(path)
    if dataset_dir is None:
        raise ValueError(f"the manifest {source['name']} needs the folder that its paths start from")
    return manifest_dataset(source, dataset_dir)


def datalist(
    manifest: str | Path | Mapping[str, Any],
    dataset_dir: str | Path,
    split: str,
    complete: bool = False,
    fold: int | None = None,
) -> list[dict[str, Any]]:
    """The cases of one split as MONAI's dictionaries: image, label, case, annotated (a list of 0 and 1, one a class).

    An image of several files, one a channel, is a list. Cases without a label are left out.

    Args:
        manifest: name, path or a loaded manifest; or one's own data: a MONAI datalist, a CSV, an nnU-Net folder.
        dataset_dir: the folder that the paths start from.
        split: "train", "validation" or "test".
        complete: only cases in which every organ was contoured.
        fold: the fold to validate with, see `Dataset.of_split`.

    Raises:
        FileNotFoundError: a file of the split is not in ``dataset_dir``.
        ValueError: the split is empty, labels have no names or leave a number out, or the manifest lists no cases.
    """
    dataset = dataset_of(manifest, dataset_dir)
    if not dataset.labels:
        raise ValueError(
            f'{dataset.name} does not name its labels: add "labels": {{"0": "background", "1": ...}} to the datalist, '
            "or have medseg3d check write one that does"
        )
    if max(dataset.labels) >= len(dataset.labels):
        raise ValueError(
            f"{dataset.name} has the labels {', '.join(map(str, dataset.labels))}; a network has a class for each "
            f"number, so they must be 0 to {len(dataset.labels) - 1}: renumber them in the label maps"
        )
    cases = []
    for case in dataset.of_split(split, fold):
        annotated = [int(label == 0 or case.annotated is None or label in case.annotated) for label in dataset.labels]
        if case.label is None or (complete and not all(annotated)):
            continue
        _require_files(dataset, case)
        images = [str(file) for file in case.images]
        image = images if len(images) > 1 else images[0]
        cases.append({"image": image, "label": str(case.label), "case": case.name, "annotated": annotated})
    if not cases:
        raise ValueError(_empty(dataset, split))
    return cases


def checksums(manifest: Mapping[str, Any]) -> dict[str, str | None]:
    """Path -> sha256, None where it is not given, of the files of a manifest with cases."""
    kinds = ("image", "label")
    return {
        case[kind]: case.get(f"{kind}_sha256") for case in manifest_cases(manifest) for kind in kinds if kind in case
    }


def _source(manifest: Mapping[str, Any]) -> str:
    source = manifest["source"]
    return source.get("repository") or source.get("url", "its source")


def _require_files(dataset: Dataset, case: Case) -> None:
    for file in case.files:
        if not file.exists():
            inside = file.relative_to(dataset.root) if file.is_relative_to(dataset.root) else file
            origin = dataset.source and (
                f", from {dataset.source}, changed as its notes say; for data of your own say --data with their list"
            )
            raise FileNotFoundError(
                f"{dataset.name}: {inside} is not in the dataset folder {dataset.root}; the folder must hold the files "
                f"that are listed{origin}"
            )


def _empty(dataset: Dataset, split: str) -> str:
    """Why a split has no case."""
    if split == "validation" and any(case.split == "train" for case in dataset.cases):
        advice = '; list some under "validation", or give the cases fold numbers: medseg3d check --make-folds 5'
    else:
        advice = f"; splits are {', '.join(SPLITS)}"
    return f"{dataset.name} has no case in split {split!r} with the labels that are needed{advice}"

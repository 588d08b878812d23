"""Data manifests: which patient is in which split, with checksums, licence and citation. Never images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medseg3d.resources import resource_folder

SPLITS = ("train", "validation", "test")


def load_manifest(name_or_path: str | Path) -> dict[str, Any]:
    """A manifest by its name ("openkbp_headneck") or by the path of its JSON file.

    Raises:
        FileNotFoundError: no such manifest; the message lists those that ship.
        ValueError: a patient is in two splits, or a split has another name than train, validation or test.
    """
    path = Path(name_or_path)
    if path.suffix != ".json":
        folder = resource_folder("data_manifests")
        path = folder / f"{name_or_path}.json"
        if not path.is_file():
            known = sorted(p.stem for p in folder.glob("*.json") if p.stem != "schema")
            raise FileNotFoundError(f"there is no manifest {str(name_or_path)!r}; medseg3d ships {', '.join(known)}")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(manifest, dict) or not {"name", "labels", "cases", "source"} <= manifest.keys():
        raise ValueError(
            f"{path} is no data manifest: it must have name, labels, cases and source, as schema.json says"
        )
    split_of: dict[str, str] = {}
    for case in manifest["cases"]:
        if case["split"] not in SPLITS:
            raise ValueError(f"{path.name}: a split is one of {', '.join(SPLITS)}, got {case['split']!r}")
        if split_of.setdefault(case["patient"], case["split"]) != case["split"]:
            raise ValueError(f"{path.name}: patient {case['patient']} is in two splits, which would leak between them")
    return manifest


def datalist(
    manifest: str | Path | Mapping[str, Any], dataset_dir: str | Path, split: str, complete: bool = False
) -> list[dict[str, Any]]:
    """The cases of one split as MONAI's dictionaries: image, label, case, annotated (a list of 0 and 1, one a class).

    Args:
        manifest: name, path or a loaded manifest.
        dataset_dir: the folder that the manifest's paths start from.
        split: "train", "validation" or "test".
        complete: only cases in which every organ was contoured.

    Raises:
        FileNotFoundError: a file of the split is not in ``dataset_dir``.
    """
    loaded = manifest if isinstance(manifest, Mapping) else load_manifest(manifest)
    classes = sorted(int(label) for label in loaded["labels"])
    root = Path(dataset_dir)
    cases = []
    for case in loaded["cases"]:
        annotated = [int(label == 0 or label in case["contoured"]) for label in classes]
        if case["split"] != split or (complete and not all(annotated)):
            continue
        for file in (case["image"], case["label"]):
            if not (root / file).is_file():
                raise FileNotFoundError(
                    f"{loaded['name']}: {file} is not in the dataset folder {root}; the folder must hold the files "
                    f"that the manifest names, from {loaded['source']['repository']}, changed as its notes say"
                )
        cases.append(
            {
                "image": str(root / case["image"]),
                "label": str(root / case["label"]),
                "case": Path(case["image"]).name.split(".")[0],
                "annotated": annotated,
            }
        )
    if not cases:
        raise ValueError(f"{loaded['name']} has no case in split {split!r}; splits are {', '.join(SPLITS)}")
    return cases


def verify_files(manifest: str | Path | Mapping[str, Any], dataset_dir: str | Path) -> list[str]:
    """Problems of the files in ``dataset_dir`` against the manifest's sha256; empty when all is well."""
    loaded = manifest if isinstance(manifest, Mapping) else load_manifest(manifest)
    problems = []
    for case in loaded["cases"]:
        for kind in ("image", "label"):
            path = Path(dataset_dir) / case[kind]
            if not path.is_file():
                problems.append(f"{case[kind]}: missing")
            elif hashlib.sha256(path.read_bytes()).hexdigest() != case[f"{kind}_sha256"]:
                problems.append(f"{case[kind]}: its sha256 differs from the manifest's")
    return problems

"""The cases of a data set, from the lists and folders that people have, and back to a MONAI datalist."""

from __future__ import annotations

import glob
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from medseg3d.data.csv_lists import SPLITS, Entry, csv_entries
from medseg3d.data.folder_lists import CHANNEL, channel_names, folder_entries
from medseg3d.io import write_text
from medseg3d.io.formats import split_name
from medseg3d.io.labels import label_names, whole_number

TAKEN = "a MONAI or MSD datalist (.json), an nnU-Net or MSD folder (imagesTr, labelsTr, dataset.json), or a .csv"
_SECTIONS = {"training": "train", "validation": "validation", "testing": "test", "test": "test"}


@dataclass(frozen=True)
class Case:
    """One case of a data set.

    `images` has a file for each channel. `label` is its label map, if it has one. `annotated` are the labels that were
    looked for when it was made: background may be any other one; None stands for all.
    """

    name: str
    images: tuple[Path, ...]
    label: Path | None
    patient: str
    split: str = "train"
    fold: int | None = None
    annotated: tuple[int, ...] | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """Images and label."""
        return self.images if self.label is None else (*self.images, self.label)


@dataclass(frozen=True)
class Dataset:
    """Cases with names of their own, and what the numbers in their label maps mean.

    `root` is the folder that they lie in. `labels` maps each number to its name, 0 too; empty if that is not known.
    Where `objects` is set the label maps number objects of one class. `source` says where a public set comes from,
    `notes` what the reader left out. `channels` names those of an image, empty if they are not known.
    """

    name: str
    root: Path
    cases: tuple[Case, ...]
    labels: Mapping[int, str] = field(default_factory=dict)
    objects: bool = False
    source: str = ""
    notes: tuple[str, ...] = ()
    channels: tuple[str, ...] = ()

    def of_split(self, split: str, fold: int | None = None) -> tuple[Case, ...]:
        """The cases to train on, to validate with or to test with ("train", "validation", "test").

        With a `fold` its cases are the validation, and all others that are not for the test are trained on, whatever
        their split. Without one the data set's own validation cases are; where it has none but folds, fold 0 is.

        Raises:
            ValueError: another split, or no case has that fold.
        """
        if split not in SPLITS:
            raise ValueError(f"{self.name} has no case in split {split!r}; splits are {', '.join(SPLITS)}")
        folds = {case.fold for case in self.cases if case.split != "test"} - {None}
        if fold is None and folds and not any(case.split == "validation" for case in self.cases):
            fold = min(n for n in folds if n is not None)
        if fold is None or split == "test":
            return tuple(case for case in self.cases if case.split == split)
        if fold not in folds:
            raise ValueError(f"{self.name} has no fold {fold}; it has {sorted(n for n in folds if n is not None)}")
        wanted = split == "validation"
        return tuple(case for case in self.cases if case.split != "test" and (case.fold == fold) is wanted)


def read_dataset(path: str | Path, dataset_dir: str | Path | None = None) -> Dataset:
    """The data set that a file or folder describes; whether its images are there and readable is not looked at.

    - A datalist of MONAI or of the Medical Segmentation Decathlon: JSON with lists "training", "validation" and "test"
      or "testing" of {"image", "label"}; "image" may be a list, a file for each channel. "fold", "patient", "case" and
      "contoured" (the labels that were looked for) of an entry are heeded, and "labels" of the whole.
    - A folder in the style of nnU-Net (version 1 or 2) or of the Decathlon, or its dataset.json.
    - CSV, its columns split by comma, semicolon or tab: image, label and, if you like, patient; with the names in a
      first line, or without. With one, columns split and fold are heeded too.

    A case is named after its first image, with the folders in front where several have that name; a patient is the
    case itself where none is given.

    Args:
        path: the file or the folder.
        dataset_dir: the folder that a file's relative paths start from; its own by default.

    The data set's `notes` say what was not heeded: columns and lists of other names, label maps without an
    image, files of one name in two formats.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: it is none of these, it lists no case, an entry lacks its image, or a number is none.
    """
    path = Path(path).expanduser()
    root = Path(dataset_dir).expanduser() if dataset_dir is not None else path.parent
    if path.is_dir():
        return _read_folder(path, path / "dataset.json")
    if path.suffix.lower() in (".csv", ".tsv"):
        notes: list[str] = []
        return _finished(path.stem, root, csv_entries(path, notes), {}, notes)
    if path.suffix.lower() != ".json":
        path.stat()  # such as FileNotFoundError
        raise ValueError(f"{path} is no data set; medseg3d reads {TAKEN}")
    data = read_document(path)
    if _is_of_nnunet(data):
        return _read_folder(root, path)
    return _read_json(path, root, data)


def write_datalist(dataset: Dataset, path: str | Path) -> Path:
    """Write a MONAI datalist that `read_dataset` reads back as it was.

    Paths are relative where the files lie in the list's own folder or below it, else absolute.
    """
    path = Path(path)
    folder = os.path.abspath(path.parent)
    document: dict[str, Any] = {"name": dataset.name, "labels": {str(n): name for n, name in dataset.labels.items()}}
    if dataset.objects:
        document["label_kind"] = "objects"
    if dataset.channels:
        document["channel_names"] = {str(n): name for n, name in enumerate(dataset.channels)}
    for section in ("training", "validation", "testing"):
        entries = [_entry(case, folder) for case in dataset.cases if case.split == _SECTIONS[section]]
        if entries or section == "training":
            document[section] = entries
    return write_text(path, json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def with_patients(dataset: Dataset, pattern: str) -> Dataset:
    """The same with patients found in the names of the cases: the pattern's first group, or all of its match.

    So r"^(BraTS-GLI-\\d+)-" makes one patient of BraTS-GLI-00005-000 and BraTS-GLI-00005-001.

    Raises:
        ValueError: it is no regular expression, or finds nothing in a name.
    """
    try:
        finder = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
    cases = []
    for case in dataset.cases:
        match = finder.search(case.name)
        patient = match and match[1 if finder.groups else 0]
        if not patient:  # an empty one would be the same for all cases
            raise ValueError(f"the pattern {pattern!r} finds no patient in the name of the case {case.name!r}")
        cases.append(replace(case, patient=patient))
    return replace(dataset, cases=tuple(cases))


def _finished(
    name: str,
    root: Path,
    entries: Sequence[Entry],
    data: Mapping[str, Any],
    notes: Sequence[str],
) -> Dataset:
    """A data set of entries and of what its document says besides: paths made whole, names told apart."""
    if not entries:
        raise ValueError(f"{name} lists no case: there must be at least one under {' or '.join(_SECTIONS)}")
    images = [_images(root, entry) for _, entry in entries]
    names = case_names([str(entry.get("case", "")) for _, entry in entries], images, root)
    cases = []
    for (split, entry), files, case in zip(entries, images, names, strict=True):
        label, fold, contoured = entry.get("label"), entry.get("fold"), entry.get("contoured")
        patient = entry.get("patient")
        if not isinstance(contoured, list | None):
            raise ValueError(f'{case}: "contoured" is a list of label numbers, such as [1, 2], got {contoured!r}')
        if isinstance(label, list) and len(label) == 1:
            label = label[0]
        if label is not None and not isinstance(label, str):
            raise ValueError(f"{case}: a label is one file, got {label!r}; merge several masks into one label map")
        cases.append(
            Case(
                name=case,
                images=files,
                label=root / label if label else None,
                patient=str(case if patient in (None, "") else patient),
                split=split,
                fold=None if fold in (None, "") else whole_number(fold, f"{case}: a fold"),
                annotated=None if contoured is None else tuple(whole_number(n, f"{case}: a label") for n in contoured),
            )
        )
    trained = sum(case.split == "train" for case in cases)
    if data.get("numTraining", trained) != trained:
        notes = [*notes, f"numTraining is {data['numTraining']}, there are {trained} cases to train on"]
    objects = data.get("label_kind") == "objects"
    labels = label_names(data.get("labels") or {})
    return Dataset(name, root, tuple(cases), labels, objects, notes=tuple(notes), channels=channel_names(data))


def _images(root: Path, entry: Mapping[str, Any]) -> tuple[Path, ...]:
    """The files of an entry's image; nnU-Net's lists of version 1 leave the channel's number out."""
    given = entry.get("image")
    listed = [given] if isinstance(given, str) else given
    if not listed or not isinstance(listed, list) or not all(isinstance(file, str) and file for file in listed):
        raise ValueError(f"an entry of a data set has an image, a path or a list of paths; got {dict(entry)}")
    files = [root / file for file in listed]
    if len(files) == 1 and not files[0].exists():
        stem, suffix = split_name(files[0])
        channels = sorted(files[0].parent.glob(f"{glob.escape(stem)}_[0-9][0-9][0-9][0-9]{suffix}"))
        files = channels or files
    return tuple(files)


def case_names(given: Sequence[str], images: Sequence[tuple[Path, ...]], root: Path) -> list[str]:
    """A name for each case: the given one, else its first image's, which gets its folders where it is not alone."""
    plain = [split_name(files[0])[0] for files in images]
    # A number of four digits is nnU-Net's of a channel, or the case's own: amos_0001.
    first_channels = all(stem.endswith("_0000") for stem in plain)
    stems = [
        name or (CHANNEL.sub("", stem) if len(files) > 1 or first_channels else stem)
        for name, stem, files in zip(given, plain, images, strict=True)
    ]
    count = Counter(stems)
    named = []
    for name, stem, files in zip(given, stems, images, strict=True):
        folder = files[0].parent
        parts = folder.relative_to(root).parts if folder.is_relative_to(root) else folder.parts[1:]
        named.append("_".join((*parts, stem)) if count[stem] > 1 and not name else stem)
    again = Counter(named)
    taken = set(named)
    for n, name in enumerate(named):
        if again[name] > 1:
            named[n] = next(free for m in itertools.count(n) if (free := f"{name}_{m}") not in taken)
            taken.add(named[n])
    return named


def _read_json(path: Path, root: Path, data: Mapping[str, Any]) -> Dataset:
    if not _lists_sections(data):
        raise ValueError(f"{path} is no datalist, it has no list {', '.join(_SECTIONS)}; medseg3d reads {TAKEN}")
    entries = [
        (split, {"image": entry} if isinstance(entry, str | list) else entry)
        for section, split in _SECTIONS.items()
        for entry in data.get(section) or ()
    ]
    for _, entry in entries:
        if not isinstance(entry, Mapping):
            raise ValueError(f'{path}: an entry of a datalist is {{"image": path, "label": path}}, got {entry!r}')
    others = [key for key, value in data.items() if key not in _SECTIONS and _lists_cases(value)]
    notes = [f"the list {key!r} is not read: lists of cases are {', '.join(_SECTIONS)}" for key in others]
    try:
        return _finished(str(data.get("name") or path.stem), root, entries, data, notes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _lists_cases(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(entry, Mapping) and "image" in entry for entry in value)


def _lists_sections(data: Mapping[str, Any]) -> bool:
    return any(isinstance(data.get(section), list) for section in _SECTIONS)


def _is_of_nnunet(data: Mapping[str, Any]) -> bool:
    """Whether it is a dataset.json of version 2, which lists no case or lists them by name."""
    return not _lists_sections(data) and bool(data.keys() & {"dataset", "file_ending"})


def is_datalist(path: Path) -> bool:
    """Whether a JSON file is a datalist, or may be one that is damaged, rather than a manifest."""
    try:
        data = read_document(path)
    except ValueError:
        return True  # which read_dataset will refuse
    return _lists_sections(data) or _is_of_nnunet(data) or not data.keys() & {"cases", "source"}


def read_document(path: Path) -> Mapping[str, Any]:
    """The object in a JSON file; ValueError, with the path, if there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, Mapping):
        raise ValueError(f"{path} holds no JSON object; medseg3d reads {TAKEN}")
    return data


def _read_folder(folder: Path, listing: Path) -> Dataset:
    """nnU-Net's or the Decathlon's: what dataset.json lists, else what lies in imagesTr and imagesTs."""
    if not listing.is_file() and not (folder / "imagesTr").is_dir():
        raise ValueError(f"{folder} has neither a dataset.json nor a folder imagesTr; medseg3d reads {TAKEN}")
    data = read_document(listing) if listing.is_file() else {}
    if isinstance(data.get("training"), list):
        return _read_json(listing, folder, data)
    notes: list[str] = []
    entries = folder_entries(folder, data, notes)
    return _finished(str(data.get("name") or folder.resolve().name), folder, entries, data, notes)


def _entry(case: Case, folder: str) -> dict[str, Any]:
    images = [_written(file, folder) for file in case.images]
    entry: dict[str, Any] = {"image": images if len(images) > 1 else images[0]}
    if case.label is not None:
        entry["label"] = _written(case.label, folder)
    entry |= {"case": case.name, "patient": case.patient}
    if case.fold is not None:
        entry["fold"] = case.fold
    if case.annotated is not None:
        entry["contoured"] = list(case.annotated)
    return entry


def _written(file: Path, folder: str) -> str:
    whole = Path(os.path.abspath(file))  # links stay what they are
    return (whole.relative_to(folder) if whole.is_relative_to(folder) else whole).as_posix()

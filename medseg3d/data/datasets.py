"""The cases of a data set, from the lists and folders that people have, and back to a MONAI datalist."""

from __future__ import annotations

import glob
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from medseg3d.data.csv_lists import SPLITS, Entry, csv_entries
from medseg3d.io import write_text
from medseg3d.io.formats import KINDS, RASTER_SUFFIXES, split_name

TAKEN = "a MONAI or MSD datalist (.json), an nnU-Net or MSD folder (imagesTr, labelsTr, dataset.json), or a .csv"
_SECTIONS = {"training": "train", "validation": "validation", "testing": "test", "test": "test"}
_CHANNEL = re.compile(r"_(\d{4})$")


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
    `notes` what the reader left out.
    """

    name: str
    root: Path
    cases: tuple[Case, ...]
    labels: Mapping[int, str] = field(default_factory=dict)
    objects: bool = False
    source: str = ""
    notes: tuple[str, ...] = ()

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
    - A folder in the style of nnU-Net (version 1 or 2) or of the Decathlon.
    - CSV, its columns split by comma, semicolon or tab: image, label and, if you like, patient; with the names in a
      first line, or without. With one, columns split and fold are heeded too.

    A case is named after its first image, with the folders in front where several have that name; a patient is the
    case itself where none is given.

    Args:
        path: the file or the folder.
        dataset_dir: the folder that a file's relative paths start from; its own by default.

    The data set's `notes` say what was not heeded: columns and lists of other names, label maps without an image.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: it is none of these, it lists no case, an entry lacks its image, or a number is none.
    """
    path = Path(path).expanduser()
    root = Path(dataset_dir).expanduser() if dataset_dir is not None else path.parent
    if path.is_dir():
        return _read_folder(path)
    if path.suffix.lower() in (".csv", ".tsv"):
        notes: list[str] = []
        return _finished(path.stem, root, csv_entries(path, notes), {}, notes=notes)
    if path.suffix.lower() != ".json":
        path.stat()  # such as FileNotFoundError
        raise ValueError(f"{path} is no data set; medseg3d reads {TAKEN}")
    return _read_json(path, root)


def write_datalist(dataset: Dataset, path: str | Path) -> Path:
    """Write a MONAI datalist that `read_dataset` reads back as it was.

    Paths are relative where the files lie in the list's own folder or below it, else absolute.
    """
    path = Path(path)
    folder = os.path.abspath(path.parent)
    document: dict[str, Any] = {"name": dataset.name, "labels": {str(n): name for n, name in dataset.labels.items()}}
    if dataset.objects:
        document["label_kind"] = "objects"
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
    labels: Mapping[int, str],
    objects: bool = False,
    notes: Sequence[str] = (),
) -> Dataset:
    """A data set of entries: paths made whole, names told apart."""
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
        if label is not None and not isinstance(label, str):
            raise ValueError(f"{case}: a label is one file, got {label!r}; merge several masks into one label map")
        cases.append(
            Case(
                name=case,
                images=files,
                label=root / label if label else None,
                patient=str(case if patient in (None, "") else patient),
                split=split,
                fold=None if fold in (None, "") else _whole(fold, f"{case}: a fold"),
                annotated=None if contoured is None else tuple(_whole(n, f"{case}: a label") for n in contoured),
            )
        )
    return Dataset(name, root, tuple(cases), labels, objects, notes=tuple(notes))


def _whole(value: Any, what: str) -> int:
    """A whole number of at least 0, which a file may have as text."""
    if isinstance(value, int | float | str) and str(value).removesuffix(".0").isdecimal():
        return int(float(value))
    raise ValueError(f"{what} is a whole number, 0 or more, got {value!r}")


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
        name or (_CHANNEL.sub("", stem) if len(files) > 1 or first_channels else stem)
        for name, stem, files in zip(given, plain, images, strict=True)
    ]
    count = Counter(stems)
    named = []
    for name, stem, files in zip(given, stems, images, strict=True):
        folder = files[0].parent
        parts = folder.relative_to(root).parts if folder.is_relative_to(root) else folder.parts[1:]
        named.append("_".join((*parts, stem)) if count[stem] > 1 and not name else stem)
    again = Counter(named)
    return [f"{name}_{n}" if again[name] > 1 else name for n, name in enumerate(named)]


def _read_json(path: Path, root: Path) -> Dataset:
    data = read_document(path)
    if not any(isinstance(data.get(section), list) for section in _SECTIONS):
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
        name = str(data.get("name") or path.stem)
        return _finished(name, root, entries, _label_names(data), data.get("label_kind") == "objects", notes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _lists_cases(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(entry, Mapping) and "image" in entry for entry in value)


def is_datalist(path: Path) -> bool:
    """Whether a JSON file is a datalist, or may be one that is damaged, rather than a manifest."""
    try:
        data = read_document(path)
    except ValueError:
        return True  # which read_dataset will refuse
    return any(isinstance(data.get(section), list) for section in _SECTIONS) or not data.keys() & {"cases", "source"}


def read_document(path: Path) -> Mapping[str, Any]:
    """The object in a JSON file; ValueError, with the path, if there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, Mapping):
        raise ValueError(f"{path} holds no JSON object; medseg3d reads {TAKEN}")
    return data


def _label_names(data: Mapping[str, Any]) -> dict[int, str]:
    """Number -> name from {"1": "liver"} (MONAI, MSD) or {"liver": 1} (nnU-Net version 2, also with regions [1, 2])."""
    labels = data.get("labels") or {}
    if not isinstance(labels, Mapping):
        raise ValueError(f'"labels" maps numbers to names or names to numbers, got {labels!r}')
    if all(str(key).isdecimal() for key in labels):
        names = {int(number): str(name) for number, name in labels.items()}
        return {0: "background", **dict(sorted(names.items()))} if names else {}
    if "ignore" in labels:
        raise ValueError(
            f"nnU-Net's label 'ignore' ({labels['ignore']}) stands for voxels that nobody annotated, and medseg3d can "
            'leave out whole organs of a case only ("contoured"): leave such cases out, or make it background'
        )
    found: dict[int, tuple[int, str]] = {}  # number -> size of the smallest region that holds it, and its name
    for name, numbers in labels.items():
        region = [_whole(n, f"the label {name!r}") for n in (numbers if isinstance(numbers, list) else [numbers])]
        for n in region:
            named = name if len(region) == 1 else f"{name} {n}"
            found[n] = min(found.get(n, (len(region), named)), (len(region), named))
    return {0: "background"} | {n: found[n][1] for n in sorted(found)}


def _read_folder(folder: Path) -> Dataset:
    """nnU-Net's or the Decathlon's: what dataset.json lists, else what lies in imagesTr and imagesTs."""
    listing = folder / "dataset.json"
    if not listing.is_file() and not (folder / "imagesTr").is_dir():
        raise ValueError(f"{folder} has neither a dataset.json nor a folder imagesTr; medseg3d reads {TAKEN}")
    data = read_document(listing) if listing.is_file() else {}
    if isinstance(data.get("training"), list):
        return _read_json(listing, folder)
    notes: list[str] = []
    entries: Sequence[Entry]
    if isinstance(data.get("dataset"), Mapping):  # version 2 may list its cases by name
        listed = data["dataset"].items()
        for name, entry in listed:
            if not isinstance(entry, Mapping):
                raise ValueError(
                    f'{listing}: a case of "dataset" is {{"images": [paths], "label": path}}, {name!r} is {entry!r}'
                )
        entries = [("train", {"case": name, "image": e.get("images"), "label": e.get("label")}) for name, e in listed]
    else:
        ending = str(data.get("file_ending", "")).lower()
        entries = [*_scanned(folder, "Tr", "train", ending, notes), *_scanned(folder, "Ts", "test", ending, notes)]
        if not entries:
            which = f"that ends in {ending!r}, the file_ending of dataset.json" if ending else "that medseg3d reads"
            raise ValueError(f"{folder / 'imagesTr'} holds no image {which}")
    trained = sum(split == "train" for split, _ in entries)
    if data.get("numTraining", trained) != trained:
        notes.append(f"dataset.json says numTraining {data['numTraining']}, there are {trained} cases")
    return _finished(str(data.get("name") or folder.resolve().name), folder, entries, _label_names(data), notes=notes)


def _scanned(folder: Path, end: str, split: str, ending: str, notes: list[str]) -> Iterator[Entry]:
    """The cases in images<end> with their files in labels<end>; labels without an image go to the notes."""
    images: dict[str, list[str]] = {}
    labels = {_stem(file, ending): file for file in _files(folder / f"labels{end}", ending)}
    files = {_stem(file, ending): str(file.relative_to(folder)) for file in _files(folder / f"images{end}", ending)}
    for stem, file in files.items():
        case = _CHANNEL.sub("", stem)
        own = stem in labels or f"{case}_0000" not in files  # the number is the case's, not a channel's
        images.setdefault(stem if own else case, []).append(file)
    notes += [f"labels{end}/{labels[name].name} has no image in images{end}" for name in sorted(labels.keys() - images)]
    for name, channels in images.items():
        entry: dict[str, Any] = {"case": name, "image": channels}
        if name in labels:
            entry["label"] = str(labels[name].relative_to(folder))
        yield split, entry


def _files(folder: Path, ending: str) -> list[Path]:
    """Images in a folder, sorted; the hidden files that some systems leave beside them are none."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    known = (ending,) if ending else (*KINDS, *RASTER_SUFFIXES)
    return [file for file in files if not file.name.startswith(".") and file.name.lower().endswith(known)]


def _stem(file: Path, ending: str) -> str:
    return file.name[: -len(ending)] if ending else split_name(file)[0]


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

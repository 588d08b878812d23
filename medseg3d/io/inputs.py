"""From what a user names (files, folders, zips, patterns) to the cases to segment, and why the rest was skipped."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from medseg3d.io.formats import KINDS, RASTER_SUFFIXES, READABLE, Kind, kind_of, split_name

_UNKNOWN = f"not a format that medseg3d reads ({READABLE})"
_PICTURE = "a picture, but the model segments scans: name a model of pictures"
_SCAN = f"a scan, but the model segments pictures ({', '.join(RASTER_SUFFIXES)})"
_NO_PICTURE = f"not a picture ({', '.join(RASTER_SUFFIXES)})"


class NothingFound(ValueError):
    """No case among the inputs."""


@dataclass(frozen=True)
class Case:
    """One scan or picture to read: `name` is unique in its batch and fit for a file name; `kind` is its reader."""

    name: str
    path: Path
    kind: Kind


@dataclass(frozen=True)
class Inputs:
    """The cases, in the order given and sorted within a folder, and (path, reason) of everything that is none."""

    cases: tuple[Case, ...]
    skipped: tuple[tuple[Path, str], ...]


def find_inputs(items: Sequence[str | Path] | str | Path, pictures: bool = False) -> Inputs:
    """Cases among files, folders, zips of DICOM files and patterns such as "scans/*.nii.gz" ("**" for any depth).

    A file given by name or pattern is taken if its format is known. In a folder, every image file directly inside is a
    case, and so is every folder with DICOM files, at any depth (folders that hold one series together are one case);
    what medseg3d wrote there (`*_seg`, `*.entropy`, `*.margin`) is not, and hidden files are passed over. A case is
    named after its file or DICOM folder; where two would have one name, the folders above are put in front.

    With ``pictures`` PNG, JPEG, TIFF and BMP files are the cases and scans are not, by the same rules; previews of
    medseg3d's (`*.preview`) in a folder are none either.

    Raises:
        NothingFound: there is no case; the message lists why.
    """
    items = [items] if isinstance(items, (str, Path)) else items
    found: dict[Path, tuple[Path, Kind]] = {}
    skipped: list[tuple[Path, str]] = []
    for path, kind, reason in (outcome for item in items for outcome in _look(Path(item).expanduser(), pictures)):
        if kind is None:
            skipped.append((path, reason))
        elif path.resolve() in found:
            skipped.append((path, "given twice"))
        else:
            found[path.resolve()] = path, kind
    if not found:
        reasons = [f"{path}: {reason}" for path, reason in skipped[:5]] or ["none given"]
        reasons += [f"and {len(skipped) - 5} more"] if len(skipped) > 5 else []
        wanted = "picture" if pictures else "scan"
        raise NothingFound(f"no {wanted} to read among the inputs ({'; '.join(reasons)})")
    # As they were given: a link has a name of its own, which may hide that of what it leads to.
    given = {Path(os.path.abspath(path)): (path, kind) for path, kind in found.values()}
    names = _unique_names(list(given))
    return Inputs(tuple(Case(names[key], path, kind) for key, (path, kind) in given.items()), tuple(skipped))


_Outcome = tuple[Path, Kind | None, str]  # a path with its kind or, if it is no case, the reason


def _look(path: Path, pictures: bool) -> Iterator[_Outcome]:
    """Everything that one argument stands for."""
    if path.exists() or not glob.has_magic(str(path)):
        yield from _look_at(path, pictures)
        return
    matches = sorted(glob.glob(str(path), recursive=True))
    for match in matches:
        yield from _look_at(Path(match), pictures)
    if not matches:
        yield path, None, "the pattern matches nothing"


def _look_at(path: Path, pictures: bool) -> Iterator[_Outcome]:
    if path.is_dir():
        outcomes = _with_whole_series(list(_look_in(path, pictures)))
        yield from outcomes or [(path, None, "the folder holds no image file")]
    elif path.exists():
        yield path, *_kind_or_reason(path, pictures)
    else:
        yield path, None, "no such file or folder"


def _look_in(folder: Path, pictures: bool, top: bool = True) -> Iterator[_Outcome]:
    """The cases of a folder; below the top only DICOM, since a folder beside scans often holds their label maps."""
    try:
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        yield folder, None, f"cannot be opened ({error.strerror})"
        return
    listed = [entry for entry in entries if entry.is_file() and entry.name.upper() != "DICOMDIR"]
    files = {entry: _kind_or_reason(entry, pictures) for entry in listed}
    if any(kind == "dicom" for kind, _ in files.values()):
        yield folder, "dicom", ""
    others = {file: outcome for file, outcome in files.items() if outcome[0] != "dicom"}
    if top:
        for file, outcome in others.items():
            yield file, *_in_folder(file, *outcome)
    elif any(kind for kind, _ in others.values()):
        yield folder, None, "image files in subfolders are not searched; give this folder or a pattern"
    for entry in entries:
        if entry.is_dir():
            yield from _look_in(entry, pictures, top=False)


def _with_whole_series(outcomes: list[_Outcome]) -> list[_Outcome]:
    """Of folders that hold parts of one series, the one above them that holds nothing else, or why there is none."""
    folders = [path for path, kind, _ in outcomes if kind == "dicom" and path.is_dir()]
    if len(folders) < 2:
        return outcomes
    try:
        from medseg3d.io.dicom import spread_series
    except ModuleNotFoundError:  # which is told where the cases are read
        return outcomes
    instead: dict[Path, _Outcome | None] = {}
    for parts in spread_series(folders):
        above = Path(os.path.commonpath(parts))
        inside = {folder for folder in folders if folder == above or above in folder.parents}
        if inside == set(parts) and above not in parts:
            instead |= dict.fromkeys(parts) | {parts[0]: (above, "dicom", "")}
            continue
        for part, other in zip(parts, [*parts[1:], parts[0]], strict=True):
            why = f"a part of a series that goes on in {other}: put all of it, and nothing else, into one folder"
            instead[part] = part, None, why
    changed = (instead.get(outcome[0], outcome) for outcome in outcomes)
    return [outcome for outcome in changed if outcome is not None]


def _in_folder(file: Path, kind: Kind | None, reason: str) -> tuple[Kind | None, str]:
    """What a file that was not itself named stands for."""
    stem, suffix = split_name(file)
    if kind and (stem == "seg" or stem.endswith("_seg")):
        return None, "looks like a label map of medseg3d's; give it by name to use it as an input"
    if kind and stem.endswith((".entropy", ".margin")):
        return None, "looks like a map of uncertainty of medseg3d's; give it by name to use it as a scan"
    if kind == "picture" and stem.endswith(".preview"):
        return None, "looks like a preview of medseg3d's; give it by name to use it as a picture"
    if suffix.startswith(".img"):
        return None, "the voxels of a .hdr/.img pair, read with its .hdr"
    return kind, reason


def _kind_or_reason(file: Path, pictures: bool) -> tuple[Kind | None, str]:
    suffix = split_name(file)[1]
    if pictures:
        return ("picture", "") if suffix in RASTER_SUFFIXES else (None, _SCAN if KINDS.get(suffix) else _NO_PICTURE)
    try:
        kind = kind_of(file)
    except OSError as error:
        return None, f"cannot be opened ({error.strerror})"
    return kind, "" if kind else _PICTURE if suffix in RASTER_SUFFIXES else _UNKNOWN


def _unique_names(paths: list[Path]) -> dict[Path, str]:
    """Stems; with their format where one folder has the stem twice, with folders in front where several have it."""
    names = {path: path.name if path.is_dir() else split_name(path)[0] for path in paths}
    beside = Counter((path.parent, name.casefold()) for path, name in names.items())
    for path, name in names.items():
        if beside[path.parent, name.casefold()] > 1 and path.is_file():
            names[path] = path.name.replace(".", "_")
    folders = {path: list(path.parent.parts) for path in paths}
    while True:
        count = Counter(name.casefold() for name in names.values())  # some file systems know no case
        shared = [path for path, name in names.items() if count[name.casefold()] > 1 and len(folders[path]) > 1]
        if not shared:
            return names
        for path in shared:
            names[path] = f"{folders[path].pop()}_{names[path]}"

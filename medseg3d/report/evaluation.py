"""Folders of predictions against folders of references: pairs by name, a row per case and label, means per label."""

from __future__ import annotations

import errno
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medseg3d.errors import in_words
from medseg3d.io import read_label_table, read_volume
from medseg3d.io.formats import KINDS, split_name
from medseg3d.io.labels import count_labels
from medseg3d.metrics.evaluate import COLUMNS, Row, evaluate_case
from medseg3d.report.records import require_same_grid, write_csv
from medseg3d.volume import Volume

Files = str | Path | Sequence[str | Path]  # a folder, a file, or several

# What a file is rather than whose: dropped from the end of a name to get the case. The first group are label maps.
_LABEL_MAPS = "seg|segmentation|label|labels|labelmap|mask|oar|pred|prediction|gt|reference|trans"
_IMAGES = "ct|image|img|0000"
_ROLES = re.compile(rf"(?<=.)([_-]({_LABEL_MAPS}|{_IMAGES}))+$", re.IGNORECASE)
_LABEL_WORDS = re.compile(rf"(?<=.)([_-]({_LABEL_MAPS}))+$", re.IGNORECASE)
_IMAGE = re.compile(rf"[_-]({_IMAGES})$", re.IGNORECASE)
_NUMBER = re.compile(r"(.+_)(\d{4})$")


@dataclass(frozen=True)
class Pairs:
    """`pairs`: case -> (prediction, reference), sorted by case. `unpaired`: each file left over, and why."""

    pairs: Mapping[str, tuple[Path, Path]]
    unpaired: Sequence[tuple[Path, str]]


@dataclass(frozen=True)
class Evaluation:
    """`rows`: those of `evaluate_case` with the "case" in front. `unpaired`: files that were left out, and why.

    `failures`: cases that could not be measured, and why. `unnamed`: numbers in the label maps that have no name, which
    do not count.
    """

    rows: Sequence[Row]
    unpaired: Sequence[tuple[Path, str]]
    failures: Sequence[tuple[str, str]] = ()
    unnamed: Sequence[int] = ()


def case_name(path: str | Path) -> str:
    """The case that a file belongs to: its name without the suffix and without trailing words that say what it is.

    These words follow "_" or "-": seg, segmentation, label(s), labelmap, mask, oar, pred, prediction, gt, reference,
    trans, ct, image, img, 0000. So "pt1_ct_seg.nii.gz" and "pt1_oar.nrrd" are both the case "pt1".
    """
    return _ROLES.sub("", split_name(path)[0])


def pair_cases(predictions: Files, references: Files, pictures: bool = False) -> Pairs:
    """Pair predictions with references by `case_name`; one file on either side is a pair whatever the names.

    Of a folder the NIfTI, NRRD and MetaImage files directly inside are taken, or with ``pictures`` the PNG and TIFF
    files, previews left out. A name that ends in an image's word (_ct) is set aside where the same side has a label map
    of that case (_seg, _oar). Of several label maps of a case those that have one name on both sides are taken; unless
    there is just one such pair, the case is left out. 0000 belongs to the case where there is 0001 or the like too.

    Raises:
        ValueError: no pair at all.
        FileNotFoundError: a folder or file that does not exist.
    """
    sides = _listed(predictions), _listed(references)
    if all(len(side) == 1 and side[0].is_file() for side in sides):
        return Pairs({case_name(sides[0][0]): (sides[0][0], sides[1][0])}, [])
    names = [_names(_files(side, pictures)) for side in sides]
    numbers = [match for side in names for name in side.values() if (match := _NUMBER.match(name))]
    numbered = {match[1] for match in numbers if match[2] != "0000"}
    predicted, expected = (_by_case(side, numbered) for side in names)
    pairs: dict[str, tuple[Path, Path]] = {}
    unpaired: list[tuple[Path, str]] = []
    for case in sorted(predicted.keys() | expected.keys()):
        mine, theirs = predicted.get(case, []), expected.get(case, [])
        found = _same_names(mine, theirs)
        if len(found) == 1:
            pairs[case] = found[0]
            why = f"{found[0][0].name} is of the same case, {case}, and on both sides"
        elif mine and theirs:
            several = " and ".join(path.name for side in (mine, theirs) if len(side) > 1 for path in side)
            why = f"{several} are all of the case {case}: move all but one away, or rename them"
        else:
            why = f"no {'reference' if mine else 'prediction'} of this name"
        unpaired += [(path, why) for path in mine + theirs if path not in pairs.get(case, ())]
    if not pairs and predicted.keys() & expected.keys():
        raise ValueError(next(why for _, why in unpaired if " are all of the case " in why))
    if not pairs:
        one, other = (
            ", ".join([*sorted(side)[:3], *["..."] * (len(side) > 3)]) or "none" for side in (predicted, expected)
        )
        raise ValueError(
            "no prediction has the name of a reference; names are compared without words such as _seg or _ct:"
            f" predictions {one}; references {other}"
        )
    return Pairs(pairs, unpaired)


def is_label_image(file: Path) -> bool:
    """Whether a file may be a label image, by its name."""
    stem, suffix = split_name(file)
    return suffix in (".png", ".tif", ".tiff") and not stem.endswith(".preview")


def evaluate_volumes(
    predicted: Volume,
    expected: Volume,
    labels: Mapping[int, str],
    nsd_tolerance_mm: float = 2.0,
    annotated: Collection[int] | None = None,
    names: tuple[str, str] = ("the prediction", "the reference"),
) -> list[Row]:
    """`evaluate_case` of two label maps, in true mm also on a sheared grid.

    The reference may be stored with its axes in another order. `annotated`: the labels that were contoured in this
    case; others are not counted. None means all. `names` are for the error.

    Raises ValueError when the two are not on the same grid.
    """
    expected = expected.reoriented(predicted.orientation)
    require_same_grid(predicted.geometry, expected.geometry, names)
    ignore = () if annotated is None else set(labels) - set(annotated)
    steps = predicted.affine[:3, :3]
    return evaluate_case(predicted.array, expected.array, steps, labels, nsd_tolerance_mm, ignore)


def evaluate_folders(
    predictions: Files,
    references: Files,
    labels: Mapping[int, str],
    nsd_tolerance_mm: float = 2.0,
    annotated: Mapping[str, Collection[int]] | None = None,
) -> Evaluation:
    """Every prediction against the reference of its case; see `pair_cases` and `evaluate_volumes`.

    `annotated`: case (a `case_name`, or the name of one of its files) -> the labels that were contoured in it; a case
    that is not named there has all. A case fails where a file is no label map, says that it has another number for one
    of the labels, or the two are not on one grid; it does not stop the others.

    Raises ValueError as `pair_cases` does, and the error of the first case if all fail.
    """
    found = pair_cases(predictions, references)
    contoured = {case_name(name): organs for name, organs in (annotated or {}).items()}
    rows: list[Row] = []
    errors: dict[str, Exception] = {}
    unnamed: set[int] = set()
    for case, files in found.pairs.items():
        try:
            sides = read_label_map(files[0]), read_label_map(files[1])
            for file in files:
                require_numbers(file, labels)
            names = str(files[0]), str(files[1])
            measured = evaluate_volumes(*sides, labels, nsd_tolerance_mm, contoured.get(case), names)
        except (ValueError, OSError) as error:
            errors[case] = error
            continue
        rows += [{"case": case, **row} for row in measured]
        unnamed.update(*(count_labels(side.array) for side in sides))
    if errors and not rows:
        raise next(iter(errors.values()))
    failures = [(case, in_words(error)) for case, error in errors.items()]
    return Evaluation(rows, found.unpaired, failures, sorted(unnamed - {0, *labels}))


def require_numbers(path: str | Path, labels: Mapping[int, str]) -> None:
    """ValueError if a label map file says that it has another number for one of the labels."""
    table = read_label_table(path)
    numbers = {name.casefold(): number for number, name in labels.items()}
    for number, name in table.names.items() if table is not None else ():
        wanted = numbers.get(name.casefold(), number)
        if wanted != number:
            raise ValueError(
                f"{path} calls {name} label {number}, but here it is {wanted}: numbers are compared, so both sides "
                "must use the same for an organ; renumber one of them"
            )


def write_evaluation_csv(path: str | Path, rows: Iterable[Row]) -> Path:
    """Write one line per case and label, atomically; where a cell is empty, the note says why."""
    return write_csv(path, rows, ("case", *COLUMNS))


# Measure -> its heading in the summary and the digits after the point.
_SUMMARY = {
    "dice": ("Dice", 3),
    "nsd": ("NSD", 3),
    "hd95_mm": ("HD95 mm", 2),
    "volume_error_percent": ("volume error %", 1),
}


def summarise(rows: Iterable[Row]) -> list[Row]:
    """A row per label, as they first appear: label, name, cases (with a reference), missed (those not predicted).

    Further, of dice, nsd, hd95_mm and volume_error_percent the mean over cases and the standard deviation
    ("dice_std"). A value that is not defined is left out; the mean of nothing is None. A missed label counts with Dice
    and NSD 0 but has no HD95: read that beside "missed".
    """
    by_label: dict[int, list[Row]] = {}
    for row in rows:
        by_label.setdefault(row["label"], []).append(row)
    summary = []
    for label, all_cases in by_label.items():
        cases = [row for row in all_cases if row["dice"] is not None]
        line = {"label": label, "name": all_cases[0]["name"], "cases": len(cases)}
        line["missed"] = sum(row["volume_ml"] == 0 for row in cases)
        for measure in _SUMMARY:
            values = [row[measure] for row in cases if row[measure] is not None]
            line[measure] = float(np.mean(values)) if values else None
            line[f"{measure}_std"] = float(np.std(values)) if values else None
        summary.append(line)
    return summary


def summary_table(rows: Iterable[Row]) -> str:
    """The summary as text: mean ± standard deviation per label, and at the end the mean of the labels' means."""
    summary = summarise(rows)
    lines = [["label", "cases", "missed", *(heading for heading, _ in _SUMMARY.values())]]
    for row in summary:
        cells = (_mean_and_std(row[m], row[f"{m}_std"], digits) for m, (_, digits) in _SUMMARY.items())
        lines.append([row["name"], str(row["cases"]), str(row["missed"]), *cells])
    lines.append(["mean of labels", "", ""])
    for measure, (_, digits) in _SUMMARY.items():
        means = [row[measure] for row in summary if row[measure] is not None]
        lines[-1].append(f"{np.mean(means):.{digits}f}" if means else "n/a")
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    return "\n".join(
        name.ljust(first) + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, others, strict=True))
        for name, *cells in lines
    )


def _mean_and_std(mean: float | None, std: float | None, digits: int) -> str:
    return "n/a" if mean is None else f"{mean:.{digits}f} ± {std:.{digits}f}"


def _listed(given: Files) -> list[Path]:
    paths = [Path(path) for path in ([given] if isinstance(given, (str, Path)) else given)]
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(errno.ENOENT, "no such file or folder", str(path))
    return paths


def _files(paths: Iterable[Path], pictures: bool) -> Iterator[Path]:
    """The files among `paths`, and the label maps or images directly in the folders among them."""
    for path in paths:
        if path.is_dir():
            files = (file for file in sorted(path.iterdir()) if not file.name.startswith("."))
            yield from filter(is_label_image if pictures else _is_scan, files)
        else:
            yield path


def _is_scan(file: Path) -> bool:
    return KINDS.get(split_name(file)[1]) in ("nifti", "itk")


def _names(files: Iterable[Path]) -> dict[Path, str]:
    """Each file's name without the words of a label map; of a .hdr and an .img beside it the first alone."""
    stems = {path: path.with_name(split_name(path)[0]) for path in files}
    headers = {stem for path, stem in stems.items() if split_name(path)[1].startswith(".hdr")}
    return {
        path: _LABEL_WORDS.sub("", stem.name)
        for path, stem in stems.items()
        if stem not in headers or not split_name(path)[1].startswith(".img")
    }


def _by_case(names: Mapping[Path, str], numbered: Collection[str]) -> dict[str, list[Path]]:
    """The label maps of each case, images set aside; what is in front of a number is ``numbered`` if that counts."""
    groups: dict[str, list[Path]] = {}
    images = set()
    for path, name in names.items():
        match = _NUMBER.match(name)
        if match and match[1] in numbered:
            groups.setdefault(name, []).append(path)
            continue
        groups.setdefault(case_name(path), []).append(path)
        if _IMAGE.search(split_name(path)[0]):
            images.add(path)
    return {case: [path for path in paths if path not in images] or paths for case, paths in groups.items()}


def _same_names(predicted: Sequence[Path], expected: Sequence[Path]) -> list[tuple[Path, Path]]:
    """Of the label maps of a case those that are called the same on both sides; the only ones, whatever they are."""
    found = [(a, b) for a in predicted for b in expected]
    return found if len(found) == 1 else [(a, b) for a, b in found if split_name(a)[0] == split_name(b)[0]]


def read_label_map(path: str | Path) -> Volume:
    """A label map file; whole numbers stored as floating point, as many tools do, become integers."""
    volume = read_volume(path)
    if volume.dtype.kind == "f":
        whole = np.rint(volume.array)
        if not np.array_equal(whole, volume.array):
            raise ValueError(f"{path} is no label map: it holds fractions, such as probabilities or an image do")
        volume = volume.with_array(whole.astype(np.int32))
    if volume.array.min(initial=0) < 0:
        raise ValueError(f"{path} is no label map: it holds numbers below 0, as a CT does; give the segmentation of it")
    return volume

"""Which prediction belongs to which reference, by the names of their files."""

from __future__ import annotations

import errno
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from medseg3d.io.formats import KINDS, split_name

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
    ambiguous: list[str] = []
    for case in sorted(predicted.keys() | expected.keys()):
        mine, theirs = predicted.get(case, []), expected.get(case, [])
        found = _same_names(mine, theirs)
        if len(found) == 1:
            pairs[case] = found[0]
            why = f"{found[0][0].name} is of the same case, {case}, and on both sides"
        elif mine and theirs:
            several = " and ".join(path.name for side in (mine, theirs) if len(side) > 1 for path in side)
            why = f"{several} are all of the case {case}: move all but one away, or rename them"
            ambiguous.append(why)
        else:
            why = f"no {'reference' if mine else 'prediction'} of this name"
        unpaired += [(path, why) for path in mine + theirs if path not in pairs.get(case, ())]
    if not pairs and ambiguous:
        raise ValueError(ambiguous[0])
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

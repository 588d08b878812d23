"""Is a data set fit to train on? Geometry, labels, numbers, patients and files are looked at before hours are spent."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medseg3d.data.datasets import Case, Dataset
from medseg3d.data.folds import make_folds
from medseg3d.data.known_files import KnownFiles
from medseg3d.geometry import Geometry
from medseg3d.io import RASTER_SUFFIXES, read_geometry, read_image, read_label_image, read_label_table, read_volume
from medseg3d.io.digest import voxels_sha256
from medseg3d.io.formats import split_name
from medseg3d.io.labels import count_labels, whole_numbers

Grade = Literal["fault", "doubt"]
Grid = Geometry | tuple[int, ...]  # of a scan; of a picture its rows and columns

_SOME = 5  # names in a sentence
_MANY_LABELS = 255  # more numbers without a name than a label map of classes has
_AS_IN_AN_IMAGE = ", as in an image: are image and label swapped?"


@dataclass(frozen=True)
class Finding:
    """What is wrong with a case, or with the whole data set (`case` is "" then).

    A "fault" makes the case unfit or the figures of a comparison wrong; a "doubt" may be as it should.
    """

    case: str
    grade: Grade
    text: str


@dataclass(frozen=True)
class Facts:
    """What is known of a readable case; `voxels` of each label but 0 are None where voxels were not looked at."""

    grid: Grid
    voxels: Mapping[int, int] | None = None


@dataclass(frozen=True)
class Report:
    """Findings, those on the whole data set last, and the facts of each case by its name.

    `dataset` is what was looked at, with the new folds, and with names where its labels had none: those that its label
    maps have for them, else "label_1".
    """

    dataset: Dataset
    findings: tuple[Finding, ...]
    facts: Mapping[str, Facts] = field(default_factory=dict)

    @property
    def present(self) -> dict[str, set[int]]:
        """The labels in the label map of each case, if voxels were looked at."""
        return {name: set(facts.voxels) for name, facts in self.facts.items() if facts.voxels is not None}

    def of_grade(self, grade: Grade) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.grade == grade)


def check_dataset(
    dataset: Dataset,
    manifest: Mapping[str, Any] | None = None,
    quick: bool = False,
    told: Callable[[Case], None] = lambda case: None,
    folds: int | None = None,
    seed: int = 0,
) -> Report:
    """Look at every file of a data set.

    Args:
        dataset: what to look at.
        manifest: a loaded manifest with cases; the files are compared with its sha256.
        quick: look at headers only: no voxels, no labels, no contents that are alike.
        told: is called with each case before it is looked at.
        folds: how many the patients are dealt into, instead of the folds and splits that they have: see `make_folds`.
        seed: of the folds.

    Raises:
        ValueError: the manifest lists no cases, or so many folds cannot be.
    """
    known = None if manifest is None else KnownFiles(manifest, dataset.root)
    if folds is not None:
        make_folds(dataset, folds, seed)  # raises what it may before hours are spent on voxels
    findings: list[Finding] = [Finding("", "doubt", note) for note in dataset.notes]
    facts: dict[str, Facts] = {}
    images: dict[str, tuple[str, ...]] = {}  # the same where the voxels are
    names: dict[int, str] = {}
    for case in dataset.cases:
        told(case)
        look = _Look(dataset, case, quick, names)
        found = look.facts()
        if found is not None:
            facts[case.name] = found
        images[case.name] = tuple(look.images)
        findings += look.findings
        if known is not None:
            findings += [
                Finding(case.name, "fault" if unfit else "doubt", text) for text, unfit in known.differences(case)
            ]
    present = Report(dataset, (), facts).present
    dataset = _named(dataset, names, present)
    if folds is not None:
        dataset = make_folds(dataset, folds, seed, present)
    findings += _channels(dataset) + _contoured(dataset) + _leaks(dataset)
    findings += _repeats(dataset, images) + _shared_labels(dataset, images)
    findings += _gaps(dataset) + _unused_labels(dataset, facts)
    if known is not None and (more := known.unlisted()):
        findings.append(Finding("", "doubt", f"the manifest has more files: {_listed(more)}"))
    return Report(dataset, tuple(sorted(findings, key=lambda finding: finding.case == "")), facts)


class _Look:
    """A look at one case; what is wrong is gathered in `findings`, what tells its `images` from others', a text each.

    The names that its label map has for labels are added to `names`.
    """

    def __init__(self, dataset: Dataset, case: Case, quick: bool, names: dict[int, str]) -> None:
        self.dataset, self.case, self.quick, self.names = dataset, case, quick, names
        self.findings: list[Finding] = []
        self.images: list[str] = []

    def facts(self) -> Facts | None:
        """What is known of the case; None if its image or label cannot be read."""
        grids = [self._image(file) for file in self.case.images]
        if self.case.label is None:
            if self.case.split != "test":
                self._tell("doubt", "has no label: it is not trained on")
            voxels = None
        else:
            grid, voxels = self._label(self.case.label)
            grids.append(grid)
        first = grids[0]
        if first is None or any(grid is None for grid in grids):
            return None
        for file, grid in zip(self.case.files[1:], grids[1:], strict=True):
            assert grid is not None
            for grade, text in _differences(first, grid):
                self._tell(grade, f"{file.name}: {text}")
        return Facts(first, voxels)

    def _image(self, file: Path) -> Grid | None:
        grid, array = self._read(file, label=False)
        self.images.append(str(file.resolve()) if array is None else voxels_sha256(array))
        if array is not None:
            bad = array.size - int(np.count_nonzero(np.isfinite(array))) if array.dtype.kind == "f" else 0
            if bad:
                self._tell("fault", f"{file.name}: {bad} of {array.size} voxels are NaN or infinite")
            elif array.min() == array.max():
                self._tell("fault", f"{file.name}: every voxel is {array.flat[0]:g}")
        return grid

    def _label(self, file: Path) -> tuple[Grid | None, dict[int, int] | None]:
        grid, array = self._read(file, label=True)
        if grid is not None and not self.dataset.labels:
            self._read_names(file)
        if array is None:
            return grid, None
        try:
            counts = count_labels(whole_numbers(array, file.name))
        except ValueError as error:
            self._tell("fault", str(error))
            return grid, None
        voxels = {n: count for n, count in counts.items() if n != 0}
        self._compare(file, voxels.keys())
        return grid, voxels

    def _read_names(self, file: Path) -> None:
        try:
            table = read_label_table(file)
        except ValueError as error:
            self._tell("doubt", str(error))
            return
        for n, name in table.names.items() if table is not None else ():
            if self.names.setdefault(n, name) != name:
                self._tell("doubt", f"{file.name}: calls label {n} {name}, a label map before it {self.names[n]}")

    def _compare(self, file: Path, found: Collection[int]) -> None:
        """The labels in a label map but 0 with those that may be there."""
        named, annotated = self.dataset.labels, self.case.annotated
        if not found:
            self._tell("doubt", f"{file.name}: nothing but background")
        if min(found, default=0) < 0:
            self._tell("fault", f"{file.name}: labels are 0 or more, this has {min(found)}{_AS_IN_AN_IMAGE}")
        if self.dataset.objects:
            return
        if len(set(found) - named.keys()) > _MANY_LABELS and min(found) > 0:
            numbers = f"{len(found)} numbers from {min(found)} to {max(found)}"
            self._tell("doubt", f"{file.name}: {numbers}{_AS_IN_AN_IMAGE} If they number objects, say --objects")
        if named and (strange := sorted(set(found) - named.keys())):
            self._tell("fault", f"{file.name}: {_listed(strange)} is no label of the data set ({_range(named)})")
        if annotated is not None and (more := sorted(set(found) - set(annotated))):
            self._tell("fault", f"{file.name}: has label {_listed(more)}, which was not looked for, by the list")

    def _read(self, file: Path, label: bool) -> tuple[Grid | None, np.ndarray | None]:
        """The grid, and the voxels unless they are not wanted; None and None if the file cannot be read."""
        try:
            if not file.exists():
                raise ValueError(f"{file} does not exist")
            if split_name(file)[1] in RASTER_SUFFIXES:
                array = read_label_image(file) if label else read_image(file)
                return array.shape[:2], None if self.quick else array
            if self.quick:
                return read_geometry(file), None
            volume = read_volume(file)
            for note in volume.header.get("notes", ()):
                self._tell("doubt", f"{file.name}: {note}")
            return volume.geometry, volume.array
        except (ValueError, OSError, ImportError) as error:
            self._tell("fault", str(error))
            return None, None

    def _tell(self, grade: Grade, text: str) -> None:
        self.findings.append(Finding(self.case.name, grade, text))


def _differences(image: Grid, other: Grid) -> Iterator[tuple[Grade, str]]:
    """In what another file of a case does not lie on the image's grid."""
    if not isinstance(image, Geometry) or not isinstance(other, Geometry):
        if image != other:
            yield "fault", f"its size is {_size(other)}, the image's {_size(image)}"
        return
    if image.shape != other.shape:
        yield "fault", f"its shape is {other.shape}, the image's {image.shape}"
    elif image.orientation != other.orientation:
        yield "fault", f"its axes are {other.orientation}, the image's {image.orientation}"
    elif not np.allclose(image.spacing, other.spacing, rtol=1e-3):
        yield "fault", f"its spacing is {_mm(other.spacing)}, the image's {_mm(image.spacing)}"
    elif not image.same_as(other):
        corners = np.array(list(np.ndindex(2, 2, 2))) * np.subtract(image.shape, 1)
        apart = float(np.linalg.norm(image.world(corners) - other.world(corners), axis=1).max())
        grade: Grade = "doubt" if image.coincides(other) else "fault"
        yield grade, f"its voxels lie up to {apart:.3g} mm from the image's"


def _named(dataset: Dataset, names: Mapping[int, str], present: Mapping[str, Collection[int]]) -> Dataset:
    """Where no label has a name those of the label maps are taken; others that were found, or looked for, get one."""
    if dataset.labels:
        return dataset
    if dataset.objects:
        return replace(dataset, labels={0: "background", 1: "object"})
    found = set().union(*present.values(), *(case.annotated or () for case in dataset.cases))
    every = {n: f"label_{n}" for n in found if n > 0} | dict(names)
    return replace(dataset, labels={0: "background"} | dict(sorted(every.items()))) if every else dataset


def _channels(dataset: Dataset) -> list[Finding]:
    """Cases whose image has another number of files than the data set says, or else than most have."""
    wanted = len(dataset.channels)
    said = f"the data set has the channels {', '.join(dataset.channels)}"
    if not wanted:
        wanted = Counter(len(case.images) for case in dataset.cases).most_common(1)[0][0]
        said = f"most cases have {wanted}"
    return [
        Finding(
            case.name,
            "fault",
            f"files of the image, one a channel: {len(case.images)} ({_listed(f.name for f in case.images)}); {said}",
        )
        for case in dataset.cases
        if len(case.images) != wanted
    ]


def _contoured(dataset: Dataset) -> list[Finding]:
    """Numbers that were looked for, by the list, and are no label."""
    unknown = {case.name: sorted(set(case.annotated or ()) - dataset.labels.keys()) for case in dataset.cases}
    return [
        Finding(
            name, "fault", f"{_listed(numbers)} in contoured is no label of the data set ({_range(dataset.labels)})"
        )
        for name, numbers in unknown.items()
        if numbers and dataset.labels
    ]


def _leaks(dataset: Dataset) -> list[Finding]:
    """Patients in several splits or folds."""
    places: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for case in dataset.cases:
        if case.label is not None or case.split == "test":  # what is not trained on leaks nothing
            place = case.split if case.fold is None else f"{case.split}, fold {case.fold}"
            places[case.patient][place].append(case.name)
    return [
        Finding("", "fault", f"patient {patient} is in several splits: " + "; ".join(
            f"{place} ({_listed(names)})" for place, names in sorted(found.items())
        ))
        for patient, found in places.items()
        if len(found) > 1
    ]  # fmt: skip


def _repeats(dataset: Dataset, images: Mapping[str, tuple[str, ...]]) -> list[Finding]:
    """Cases with one and the same image."""
    alike: dict[tuple[str, ...], list[Case]] = defaultdict(list)
    for case in dataset.cases:
        alike[images[case.name]].append(case)
    return [
        Finding(
            "",
            "fault" if len({(case.split, case.fold) for case in cases}) > 1 else "doubt",
            f"{_listed([case.name for case in cases])} have the same image",
        )
        for cases in alike.values()
        if len(cases) > 1
    ]


def _shared_labels(dataset: Dataset, images: Mapping[str, tuple[str, ...]]) -> list[Finding]:
    """Cases with one label map and different images."""
    sharing: dict[Path, list[str]] = defaultdict(list)
    for case in dataset.cases:
        if case.label is not None:
            sharing[case.label.resolve()].append(case.name)
    return [
        Finding("", "doubt", f"{_listed(names)} have the same label map, {file.name}, and different images")
        for file, names in sharing.items()
        if len({images[name] for name in names}) > 1
    ]


def _gaps(dataset: Dataset) -> list[Finding]:
    """Numbers that no label has, though greater ones have a name: a network has a class for each number."""
    missing = sorted(set(range(max(dataset.labels, default=0))) - dataset.labels.keys())
    text = f"no label is {_listed(missing)}: to train, number them 0 to {len(dataset.labels) - 1}"
    return [Finding("", "doubt", text)] if missing and not dataset.objects else []


def _unused_labels(dataset: Dataset, facts: Mapping[str, Facts]) -> list[Finding]:
    looked_at = [known.voxels for known in facts.values() if known.voxels is not None]
    if dataset.objects or not looked_at:
        return []
    unused = dataset.labels.keys() - {0, *(label for voxels in looked_at for label in voxels)}
    return [Finding("", "doubt", f"no case has label {n} ({dataset.labels[n]})") for n in sorted(unused)]


def _listed(items: Iterable[Any]) -> str:
    every = [str(item) for item in items]
    return ", ".join(every[:_SOME]) + (f" and {len(every) - _SOME} more" if len(every) > _SOME else "")


def _range(labels: Mapping[int, str]) -> str:
    return f"{min(labels)} to {max(labels)}" if len(labels) == max(labels) - min(labels) + 1 else _listed(labels)


def _size(grid: Grid) -> str:
    return " x ".join(map(str, grid.shape if isinstance(grid, Geometry) else grid))


def _mm(spacing: Iterable[float]) -> str:
    return " x ".join(f"{mm:.4g}" for mm in spacing) + " mm"

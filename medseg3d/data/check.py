"""Is a data set fit to train on? Geometry, labels, numbers, patients and files are looked at before hours are spent."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medseg3d.data.datasets import Case, Dataset
from medseg3d.data.manifest import checksums
from medseg3d.geometry import Geometry
from medseg3d.io import RASTER_SUFFIXES, read_geometry, read_image, read_label_image, read_volume
from medseg3d.io.digest import file_sha256
from medseg3d.io.formats import split_name
from medseg3d.io.labels import count_labels, whole_numbers

Grade = Literal["fault", "doubt"]
Grid = Geometry | tuple[int, ...]  # of a scan; of a picture its rows and columns

_SOME = 5  # names in a sentence


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
    """Findings, those on the whole data set last, and the facts of each case by its name."""

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
) -> Report:
    """Look at every file of a data set.

    Args:
        dataset: what to look at.
        manifest: a loaded manifest with cases; the files are compared with its sha256.
        quick: look at headers only: no voxels, no labels, no contents that are alike.
        told: is called with each case before it is looked at.

    Raises:
        ValueError: the manifest lists no cases.
    """
    known = None if manifest is None else _Known(checksums(manifest), dataset.root)
    findings: list[Finding] = [Finding("", "doubt", note) for note in dataset.notes]
    facts: dict[str, Facts] = {}
    hashes: dict[str, str] = {}
    for case in dataset.cases:
        told(case)
        look = _Look(dataset, case, quick)
        found = look.facts()
        if found is not None:
            facts[case.name] = found
        if not quick or known is not None:
            digests = {}
            for file in case.files:
                with suppress(OSError):  # a file that cannot be read is a fault of the case by now
                    digests[file] = file_sha256(file)
            hashes[case.name] = " ".join(digests.get(file, str(file)) for file in case.images)
            if known is not None:
                look.findings += known.differences(case, digests)
        findings += look.findings
    findings += _channels(dataset) + _leaks(dataset) + _repeats(dataset, hashes)
    findings += _gaps(dataset) + _unused_labels(dataset, facts)
    if known is not None:
        findings += known.unlisted()
    return Report(tuple(sorted(findings, key=lambda finding: finding.case == "")), facts)


class _Look:
    """A look at one case; what is wrong is gathered in `findings`."""

    def __init__(self, dataset: Dataset, case: Case, quick: bool) -> None:
        self.dataset, self.case, self.quick = dataset, case, quick
        self.findings: list[Finding] = []

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
        if array is not None:
            bad = array.size - int(np.count_nonzero(np.isfinite(array))) if array.dtype.kind == "f" else 0
            if bad:
                self._tell("fault", f"{file.name}: {bad} of {array.size} voxels are NaN or infinite")
            elif array.min() == array.max():
                self._tell("fault", f"{file.name}: every voxel is {array.flat[0]:g}")
        return grid

    def _label(self, file: Path) -> tuple[Grid | None, dict[int, int] | None]:
        grid, array = self._read(file, label=True)
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

    def _compare(self, file: Path, found: Collection[int]) -> None:
        """The labels in a label map but 0 with those that may be there."""
        named, annotated = self.dataset.labels, self.case.annotated
        if not found:
            self._tell("doubt", f"{file.name}: nothing but background")
        if min(found, default=0) < 0:
            self._tell("fault", f"{file.name}: labels are 0 or more, this has {min(found)}")
        if self.dataset.objects:
            return
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


class _Known:
    """Files of a manifest, by path from the data set's folder or, where that is not known, by the end of the path."""

    def __init__(self, sums: Mapping[str, str | None], root: Path) -> None:
        self.by_path = {root / file: digest for file, digest in sums.items()}
        self.by_name: dict[str, list[Path]] = defaultdict(list)
        for file in self.by_path:
            self.by_name[file.name].append(file)
        self.seen: set[Path] = set()

    def differences(self, case: Case, digests: Mapping[Path, str]) -> Iterator[Finding]:
        for file in case.files:
            known = self._entry(file)
            if known is None:
                yield Finding(case.name, "doubt", f"{file.name}: not in the manifest")
                continue
            self.seen.add(known)
            wanted = self.by_path[known]
            if wanted is not None and digests.get(file, wanted) != wanted:
                yield Finding(case.name, "fault", f"{file.name}: its sha256 differs from the manifest's")

    def _entry(self, file: Path) -> Path | None:
        if file in self.by_path:
            return file
        return max(self.by_name.get(file.name, ()), key=lambda known: _common_end(file, known), default=None)

    def unlisted(self) -> list[Finding]:
        missing = sorted(file.name for file in self.by_path.keys() - self.seen)
        return [Finding("", "doubt", f"the manifest has more files: {_listed(missing)}")] if missing else []


def _common_end(a: Path, b: Path) -> int:
    """How many parts of two paths are the same, counted from the end."""
    same = (one == other for one, other in zip(reversed(a.parts), reversed(b.parts), strict=False))
    return sum(1 for _ in takewhile(bool, same))


def _channels(dataset: Dataset) -> list[Finding]:
    """Cases whose image has another number of files than most have."""
    usual = Counter(len(case.images) for case in dataset.cases).most_common(1)[0][0]
    return [
        Finding(case.name, "fault", f"files of the image, one a channel: {len(case.images)}; most cases have {usual}")
        for case in dataset.cases
        if len(case.images) != usual
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


def _repeats(dataset: Dataset, hashes: Mapping[str, str]) -> list[Finding]:
    """Cases with one and the same image."""
    alike: dict[str, list[Case]] = defaultdict(list)
    for case in dataset.cases:
        alike[hashes.get(case.name) or " ".join(str(file.resolve()) for file in case.images)].append(case)
    return [
        Finding(
            "",
            "fault" if len({(case.split, case.fold) for case in cases}) > 1 else "doubt",
            f"{_listed([case.name for case in cases])} have the same image",
        )
        for cases in alike.values()
        if len(cases) > 1
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

"""Where the files of each case of a run go, and what is refused before any case is begun."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from medseg3d.io import Inputs, sidecar_path
from medseg3d.io.formats import WRITABLE, split_name
from medseg3d.report.ledger import NAME as LEDGER
from medseg3d.report.statistics import write_statistics_csv

FAILURES, STATISTICS = "failures.csv", "statistics.csv"
UNCERTAINTIES = ("entropy", "margin")
SIDE_FILES = ("statistics", "statistics_csv", "preview", "uncertainty", "json")  # kinds, beside the segmentation
MASK = "mask "  # begins the kind of a mask, its label's number ends it
TABLES = (FAILURES, STATISTICS, LEDGER)  # of a whole folder


@dataclass(frozen=True)
class OutputPlan:
    """Where the files of each case go.

    Args:
        target: a file (its suffix names a format) for one case, or a folder.
        suffix: format of the segmentations in a folder; by default .nii.gz, and .png of pictures.
        statistics, preview: whether to write them too.
        uncertainty: "entropy" or "margin" to write that map too, which the model was loaded to make; by default the
            one that :func:`medseg3d.batch.predict_many` finds its model to make.
        pictures: what a model makes of pictures: "semantic", "instances" or "panoptic"; None for a model of scans.
            Objects and segments go into COCO's JSON too, one beside each picture and one of the whole folder.
        masks: whether to write each label of a scan as a mask of 0 and 1 too, into the folder `<case>_masks`.
        labels: number -> name of those; by default the model's, as for ``uncertainty``.
    """

    target: Path
    suffix: str = ""
    statistics: bool = False
    preview: bool = False
    uncertainty: str | None = None
    pictures: str | None = None
    masks: bool = False
    labels: Mapping[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "target", Path(self.target).expanduser())

    @property
    def writable(self) -> tuple[str, ...]:
        """The formats of a segmentation, that of a folder first unless ``suffix`` says otherwise."""
        if self.pictures is None:
            return WRITABLE
        return (".png",) if self.pictures == "panoptic" else (".png", ".tif", ".tiff")

    @property
    def is_file(self) -> bool:
        return split_name(self.target)[1] in self.writable

    @property
    def folder(self) -> Path:
        return self.target.parent if self.is_file else self.target

    @property
    def report(self) -> Path:
        """Where the record of the run goes unless somebody says otherwise."""
        return self.folder / (f"{split_name(self.target)[0]}.run.json" if self.is_file else "run.json")

    def files(self, name: str) -> dict[str, Path]:
        """Output kind -> path for the case of this name."""
        stem = self._stem(name)
        segmentation = self.target if self.is_file else self.folder / f"{stem}_seg{self.suffix or self.writable[0]}"
        files = {"segmentation": segmentation}
        if self.pictures in ("instances", "panoptic"):
            files["json"] = segmentation.with_name(f"{split_name(segmentation)[0]}.json")
        if self.statistics:
            files["statistics"] = self.folder / f"{stem}.stats.json"
            if self.is_file:  # a folder gets one table of all cases instead
                files["statistics_csv"] = self.folder / f"{stem}.stats.csv"
        if self.preview:
            files["preview"] = self.folder / f"{stem}.preview.png"
        if self.uncertainty:
            files["uncertainty"] = self.folder / f"{stem}.{self.uncertainty}.nii.gz"
        if self.masks:
            suffix = split_name(segmentation)[1].replace(".seg.nrrd", ".nrrd")
            for number, file in _file_names(self.labels).items():
                files[f"{MASK}{number}"] = self._masks_folder(name) / f"{file}{suffix}"
        return files

    def _stem(self, name: str) -> str:
        return split_name(self.target)[0] if self.is_file else name

    def _masks_folder(self, name: str) -> Path:
        return self.folder / f"{self._stem(name)}_masks"

    def files_of_others(self, name: str, kinds: Collection[str]) -> set[Path]:
        """Side files of these kinds for the case of this name that a run with other options writes, and this does not.

        The segmentation is not among them: one in another format may be wanted beside this one.
        """
        plans = (
            replace(self, statistics=True, preview=True, uncertainty=own, pictures=self.pictures and "instances")
            for own in UNCERTAINTIES
        )
        files = {path: kind for plan in plans for kind, path in plan.files(name).items()}
        own = self.files(name).values()
        return {path for path, kind in files.items() if kind in kinds and kind != "segmentation" and path not in own}

    def masks_of_others(self, name: str) -> set[Path]:
        """Masks beside the segmentation of the case of this name that this run does not write."""
        there = {path for path in self._masks_folder(name).glob("*") if split_name(path)[1] in WRITABLE}
        return there - set(self.files(name).values())

    def write_table(self, path: Path, statistics: dict[str, Any]) -> Path:
        """Write the figures of cases by name, as CSV."""
        if self.pictures is None:
            return write_statistics_csv(path, statistics)
        from medseg3d.report.picture_statistics import write_picture_statistics_csv

        return write_picture_statistics_csv(path, statistics)

    def of(self, uncertainty: str | None, labels: Mapping[int, str]) -> OutputPlan:
        """The plan for a model that makes this map of uncertainty, or none, and has these labels.

        Raises:
            ValueError: the plan is of another map.
        """
        if self.uncertainty not in (None, uncertainty):
            made = "none" if uncertainty is None else repr(uncertainty)
            raise ValueError(
                f"{self.uncertainty!r} is to be written, but the model makes {made}: load it with "
                f"uncertainty={self.uncertainty!r}, or leave it out of the plan"
            )
        return replace(self, uncertainty=uncertainty, labels=self.labels or labels)

    def prepare(self, inputs: Inputs, report: Path | None = None, resume: bool = False) -> None:
        """Make the folder, and refuse what cannot end well before any time is spent.

        Args:
            report: where the record of the run goes, if there is one.
            resume: whether what an earlier run finished is to be passed over.

        Raises:
            ValueError: several cases for one file, a format that is not written, an output that is an input, a file to
                ``resume``, or a ``report`` that would replace an input, an output, or anything but an earlier one.
            OSError: the folder, or that of the report, cannot be made or written to.
        """
        if self.is_file and len(inputs.cases) > 1:
            many = f"{len(inputs.cases)} {'scans' if self.pictures is None else 'pictures'}"
            raise ValueError(f"{many} cannot be written to one file, {self.target}: name a folder")
        if resume and self.is_file:
            raise ValueError(
                f"only a folder tells what it was made from, so {self.target} cannot be resumed: name a folder, or "
                "leave resume out"
            )
        suffix = split_name(self.target)[1] or _file_suffix(self.target)
        if suffix and not self.is_file and not self.target.is_dir():
            raise ValueError(
                f"cannot write {suffix} ({self.target}): name a file in {', '.join(self.writable)}, or a folder; one "
                "with such a name has to be there"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = os.strerror(error.errno or 0).lower()
            raise OSError(
                error.errno, f"cannot make the output folder {self.folder} ({reason}): name another"
            ) from error
        if not os.access(self.folder, os.W_OK):
            raise PermissionError(13, f"no permission to write into the output folder {self.folder}: name another")
        taken = {case.path.resolve() for case in inputs.cases}
        for case in inputs.cases:
            for path in self.files(case.name).values():
                if path.resolve() in taken:
                    raise ValueError(f"the output {path} is an input: name another output")
        if report is not None:
            self._check_report(report, inputs)

    def _check_report(self, report: Path, inputs: Inputs) -> None:
        """Refuse to replace anything but an earlier report, and a place where no file can be made."""
        files = [self.files(case.name) for case in inputs.cases]
        outputs = {path.resolve() for of_case in files for path in of_case.values()}
        outputs |= {sidecar_path(of_case["segmentation"]).resolve() for of_case in files}
        outputs |= {(self.folder / name).resolve() for name in (*TABLES, f"{self.pictures}.json")}
        reason = None
        if report.resolve() in {case.path.resolve() for case in inputs.cases}:
            reason = "it is an input"
        elif report.resolve() in outputs:
            reason = "another output of the run goes there"
        elif split_name(report)[1]:
            reason = f"{split_name(report)[1]} is the suffix of an image"
        elif report.exists() and not (report.is_file() and _begins_as_json(report)):
            reason = "what lies there is no report"
        if reason:
            raise ValueError(f"the report cannot go to {report}, {reason}: name another file, such as run.json")
        above = next(folder for folder in report.absolute().parents if folder.exists())
        if not (above.is_dir() and os.access(above, os.W_OK)):
            raise PermissionError(13, f"the report cannot go to {report}, no file can be made in {above}: name another")


def _file_names(labels: Mapping[int, str]) -> dict[int, str]:
    """Label number -> its name without what a file's name cannot have; with the number where two would be the same."""
    names = {number: re.sub(r"[^\w.+-]+", "_", name) for number, name in labels.items()}
    lower = [name.lower() for name in names.values()]
    return {number: name if lower.count(name.lower()) == 1 else f"{name}_{number}" for number, name in names.items()}


def _file_suffix(path: Path) -> str:
    """What looks like the suffix of a file, such as .txt or .gs, and not like the version in results.v2."""
    return path.suffix if re.fullmatch(r"\.[A-Za-z]{2,4}", path.suffix) else ""


def _begins_as_json(path: Path) -> bool:
    """Whether a file may be a report; one that nobody may read may not."""
    try:
        with path.open("rb") as file:
            return file.read(1) in (b"{", b"")
    except OSError:
        return False

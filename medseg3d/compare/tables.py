"""The tables of a comparison: values made of text, for Markdown and for the page, and CSV files with all figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import floor, isfinite, log10
from pathlib import Path

from medseg3d.compare.result import Comparison, Model, spaced
from medseg3d.compare.summary import MEAN, MEASURES, Estimate, Pair, Summary
from medseg3d.io import write_text
from medseg3d.metrics.evaluate import COLUMNS
from medseg3d.report.records import write_csv
from medseg3d.sizes import counted

ALPHA = 0.05
_FEWEST = 6  # patients for which a signed rank test can give p below ALPHA
_CSV_COSTS = (
    *("model", "case", "patient", "seconds", "cpu_seconds", "network_seconds", "peak_memory_mb", "held_before_mb"),
    *("device_peak_mb", "windows", "gflop"),
)
_ESTIMATE = ("model", "measure", "organ", "mean", "low_95", "high_95", "patients", "missed")
_PAIR = ("measure", "organ", "first", "second", "difference", "low_95", "high_95", "patients", "p", "p_holm")


@dataclass(frozen=True)
class Cell:
    """Text, a second line of detail, and whether it is the best of its kind or not distinguishable from it."""

    text: str
    detail: str = ""
    best: bool = False
    alike: bool = False


@dataclass(frozen=True)
class Table:
    """The first cell of a row names it; the last row may be the mean of the others."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    last_is_mean: bool = False

    def markdown(self) -> str:
        """With the best in bold; ``=`` marks what cannot be told from the best."""
        lines = ["| " + " | ".join(self.columns) + " |", "|" + " --- |" + " ---: |" * (len(self.columns) - 1)]
        lines += ["| " + " | ".join(map(_markdown, row)) + " |" for row in self.rows]
        return "\n".join([f"## {self.title}", "", *lines, *(["", self.note] if self.note else [])])

    def plain(self) -> str:
        """For a terminal, without the details."""
        lines = [list(self.columns), *([cell.text for cell in row] for row in self.rows)]
        first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
        return "\n".join(
            name.ljust(first) + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, others, strict=True))
            for name, *cells in lines
        )


def cost_table(comparison: Comparison, summary: Summary) -> Table:
    """A row for each model: how good, at what cost."""
    device = any(row["device_peak_mb"] is not None for row in comparison.costs)
    columns = ["model", "mean Dice", "NSD", "HD95 mm", "volume error %", "missed"]
    columns += ["parameters M", "GFLOP", "seconds", "peak memory MiB", *(["on the device MiB"] if device else [])]
    rows = []
    for model in comparison.models:
        failed = comparison.failed(model.name)
        typical = {name: _figures(comparison.cost(model.name, name)) for name in ("gflop", "seconds", "cpu_seconds")}
        windows = comparison.cost(model.name, "windows")
        detail = (model.strategy, counted(failed, "failure") if failed else None)
        cells = [Cell(model.name, ", ".join(filter(None, detail)))]
        cells += [_estimate_cell(comparison, summary, measure, model, MEAN) for measure in MEASURES]
        cells += [Cell(str(comparison.missed(model.name)))]
        cells += [Cell("–" if model.parameters is None else f"{model.parameters / 1e6:.2f}")]
        cells += [Cell(typical["gflop"], "" if windows is None else counted(round(windows), "window"))]
        cells += [Cell(typical["seconds"], f"CPU {typical['cpu_seconds']}")]
        peaks = ("peak_memory_mb", "device_peak_mb") if device else ("peak_memory_mb",)
        cells += [Cell(_figures(comparison.worst(model.name, name))) for name in peaks]
        rows.append(tuple(cells))
    patients = counted(len(comparison.patients), "patient")
    note = (
        f"Means of {len(comparison.shared)} organs over {patients}, organ by organ, with 95 % intervals of a bootstrap "
        "over patients. GFLOP (2 for a multiply-add), windows and seconds are medians of a case, from the scan's file "
        "to its label map; CPU seconds are summed over threads. Memory is the most that the model's process held in "
        "any case, Python and libraries included."
    )
    if comparison.clock == "cpu_seconds":
        note += " The machine was busy with other work, so that cases waited: CPU seconds tell more than seconds."
    return Table("What each one costs", tuple(columns), tuple(rows), note)


def organ_tables(comparison: Comparison, summary: Summary) -> list[Table]:
    """For each measure: a row for each organ, a column for each model."""
    tables = []
    for key, measure in MEASURES.items():
        heading = f"{measure.heading} at {comparison.nsd_tolerance_mm:g} mm" if key == "nsd" else measure.heading
        unit = f", {measure.unit}" if measure.unit else ""
        rows = []
        for organ in (*comparison.organs, MEAN):
            cells = [_estimate_cell(comparison, summary, key, model, organ) for model in comparison.models]
            rows.append((Cell("mean" if organ == MEAN else spaced(organ)), *cells))
        columns = ("organ", *(comparison.short[model.name] for model in comparison.models))
        note = {
            "hd95_mm": "A missed organ has no distance: read this beside the number of those missed.",
            "volume_error": "Without its sign, of the reference's volume.",
        }.get(key, "")
        tables.append(Table(f"{heading}{unit}", columns, tuple(rows), note, last_is_mean=True))
    return tables


def pair_table(comparison: Comparison, summary: Summary) -> Table:
    """The mean Dice of all models in pairs."""
    rows = []
    for pair in summary.pairs:
        if (pair.measure, pair.organ) != ("dice", MEAN):
            continue
        known = isfinite(pair.difference)
        between = f"{pair.low:+.3f} to {pair.high:+.3f}" if isfinite(pair.low) else ""
        cells = [
            Cell(f"{comparison.short[pair.first]} − {comparison.short[pair.second]}"),
            Cell(f"{pair.difference:+.3f}" if known else "–", between),
        ]
        cells += [Cell(str(pair.patients)), Cell(_p(pair.p)), Cell(_p(pair.p_holm), best=pair.p_holm < ALPHA)]
        rows.append(tuple(cells))
    note = (
        "Wilcoxon signed rank test on the patients' means; p (Holm) is adjusted for the number of pairs. Other "
        "measures and single organs are in pairs.csv, the organs' p adjusted for all organs and pairs of a measure."
    )
    if len(comparison.patients) < _FEWEST:
        note += f" With fewer than {_FEWEST} patients no such test can reach p = {ALPHA}."
    return Table("Mean Dice in pairs", ("models", "difference", "patients", "p", "p (Holm)"), tuple(rows), note)


def write_tables(comparison: Comparison, summary: Summary, folder: Path) -> list[Path]:
    """``comparison.md`` and the CSV files, each atomically."""
    tables = [cost_table(comparison, summary), *organ_tables(comparison, summary), pair_table(comparison, summary)]
    lines = [f"# {heading(comparison)}", "", *facts(comparison), "", *(f"{t.markdown()}\n" for t in tables if t.rows)]
    if comparison.notes:
        lines += ["## Notes", "", *(f"- {note}" for note in comparison.notes), ""]
    failures = folder / "failures.csv"
    failures.unlink(missing_ok=True)
    rows = ("model", "case", "patient", *COLUMNS)
    written = [
        write_text(folder / "comparison.md", "\n".join(lines)),
        write_csv(folder / "metrics.csv", comparison.rows, rows),
        write_csv(folder / "costs.csv", comparison.costs, _CSV_COSTS),
        write_csv(folder / "summary.csv", _estimate_rows(comparison, summary), _ESTIMATE),
        write_csv(folder / "pairs.csv", map(_pair_row, summary.pairs), _PAIR),
    ]
    if comparison.failures:
        written.append(write_csv(failures, comparison.failures, ("model", "case", "error")))
    return written


def heading(comparison: Comparison) -> str:
    """What the comparison is of."""
    what = counted(len(comparison.models), "model")
    return f"{what} on {comparison.title}" if comparison.title else f"{what} compared"


def facts(comparison: Comparison) -> list[str]:
    """Cases, machine and purpose, a sentence each."""
    cases, patients = len(comparison.cases), len(comparison.patients)
    return [
        f"{counted(cases, 'case')} of {counted(patients, 'patient')}, {counted(len(comparison.organs), 'organ')}.",
        *(f"Measured on {machine}." for machine in comparison.machines),
        "Research use only. Not for clinical decisions.",
    ]


def _estimate_cell(comparison: Comparison, summary: Summary, measure: str, model: Model, organ: str) -> Cell:
    one = summary.estimates[measure, model.name, organ]
    if not isfinite(one.mean):
        return Cell("–")
    best = summary.best(measure, organ)
    pair = None if best in (None, model.name) else summary.pair(measure, organ, model.name, best or "")
    several = len(comparison.models) > 1
    missed = comparison.missed(model.name, organ or None) if measure == "hd95_mm" and organ else 0
    return Cell(
        text=f"{one.mean:.{MEASURES[measure].digits}f}",
        detail=_between(one, MEASURES[measure].digits) + (f", {missed} missed" if missed else ""),
        best=several and model.name == best,
        alike=pair is not None and not pair.p_holm < ALPHA,
    )


def _between(one: Estimate, digits: int) -> str:
    return f"{one.low:.{digits}f} to {one.high:.{digits}f}" if isfinite(one.low) else ""


def _figures(value: float | None) -> str:
    """Three digits that count: 0.0123, 1.23, 12.3, 123, 1234."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    return f"{value:.{max(0, 2 - floor(log10(abs(value))))}f}" if abs(value) < 100 else f"{value:.0f}"


def _p(value: float) -> str:
    if not isfinite(value):
        return "–"
    return "< 0.0001" if value < 1e-4 else f"{value:.{4 if value < 0.01 else 3}f}"


def _markdown(cell: Cell) -> str:
    text = f"**{cell.text}**" if cell.best else cell.text
    mark = " =" if cell.alike else ""
    return f"{text}{mark} ({cell.detail})" if cell.detail else f"{text}{mark}"


def _estimate_rows(comparison: Comparison, summary: Summary) -> Iterator[dict[str, object]]:
    for (measure, model, organ), one in summary.estimates.items():
        figures = [_known(value) for value in (one.mean, one.low, one.high)]
        missed = comparison.missed(model, organ or None)
        cells = (model, measure, organ or "mean", *figures, one.patients, missed)
        yield dict(zip(_ESTIMATE, cells, strict=True))


def _pair_row(pair: Pair) -> dict[str, object]:
    values: Sequence[float] = (pair.difference, pair.low, pair.high)
    tested = _known(pair.p), _known(pair.p_holm)
    names = pair.measure, pair.organ or "mean", pair.first, pair.second
    return dict(zip(_PAIR, (*names, *map(_known, values), pair.patients, *tested), strict=True))


def _known(value: float) -> float | None:
    return value if isfinite(value) else None

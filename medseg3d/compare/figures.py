"""The plots of a comparison, as SVG."""

from __future__ import annotations

from math import isfinite
from statistics import median

from medseg3d.compare.result import Comparison, spaced
from medseg3d.compare.summary import MEAN, MEASURES, Summary
from medseg3d.report.svg import Axis, Chart, pareto_front

_ROW = 13  # pixels for a model's line in the plot of organs
_BETWEEN = 12  # pixels between two organs


def pareto_plot(comparison: Comparison, summary: Summary, cost: str, title: str) -> str | None:
    """Mean Dice against the median of a cost, with the front that no other model beats; None where none is known."""
    found = {}
    for n, model in enumerate(comparison.models):
        one, spent = summary.estimates["dice", model.name, MEAN], comparison.cost(model.name, cost)
        if spent and isfinite(one.mean):
            found[n] = (spent, one)
    if not found:
        return None
    ends = [value for _, one in found.values() for value in (one.low, one.high, one.mean) if isfinite(value)]
    x = Axis.around(title, [spent for spent, _ in found.values()], log=True)
    y = Axis.around("mean Dice", ends, within=(0, 1))
    chart = Chart(x, y, (370, 320), f"Mean Dice against {title}")
    front = pareto_front((spent, one.mean) for spent, one in found.values())
    chart.dashes(_stairs(front, x.high))
    for n, (spent, one) in found.items():
        name = comparison.short[comparison.models[n].name]
        if isfinite(one.low):
            chart.bar((spent, one.low), (spent, one.high), n)
        chart.point(spent, one.mean, n, f"{name}: Dice {one.mean:.3f}, {title} {spent:.3g}", size=6)
        chart.label(spent, one.mean, name, n)
    return chart.svg()


def organ_plot(comparison: Comparison, summary: Summary, measure: str) -> str | None:
    """A measure of every organ and model with its interval; None where there is nothing."""
    names = [model.name for model in comparison.models]
    organs = [*comparison.organs, MEAN]
    known = [one for (which, _, _), one in summary.estimates.items() if which == measure and isfinite(one.mean)]
    if not known:
        return None
    step = _ROW * len(names) + _BETWEEN
    height = step * len(organs)
    marks = tuple(((len(organs) - n - 0.5) * step, spaced(organ) or "mean") for n, organ in enumerate(organs))
    heading = " ".join(filter(None, (MEASURES[measure].heading, MEASURES[measure].unit)))
    x = Axis.around(heading, [v for one in known for v in (one.low, one.high) if isfinite(v)], within=_limits(measure))
    left = 24 + int(6.6 * max(len(text) for _, text in marks))
    chart = Chart(x, Axis("", 0, height, marks=marks), (560, height + 58), f"{heading} of each organ", left)
    for n, name in enumerate(names):
        for (middle, _), organ in zip(marks, organs, strict=True):
            one = summary.estimates[measure, name, organ]
            if isfinite(one.mean):
                y = middle + _ROW * ((len(names) - 1) / 2 - n)
                if isfinite(one.low):
                    chart.bar((one.low, y), (one.high, y), n)
                chart.point(
                    one.mean, y, n, f"{comparison.short[name]}, {spaced(organ) or 'mean'}: {one.mean:.3g}", size=4.5
                )
    return chart.svg()


def size_plot(comparison: Comparison) -> str | None:
    """Dice against the organ's size in the reference: each case faintly, and each organ's median of both."""
    rows = [row for row in comparison.rows if row["dice"] is not None]
    if not rows:
        return None
    x = Axis.around("volume of the organ in the reference, ml", [row["reference_ml"] for row in rows], log=True)
    y = Axis.around("Dice", [row["dice"] for row in rows], within=(0, 1))
    chart = Chart(x, y, (900, 420), "Dice against the size of the organ", head=66)
    organs = [organ for organ in comparison.organs if any(row["name"] == organ for row in rows)]
    middles = {o: median({r["case"]: r["reference_ml"] for r in rows if r["name"] == o}.values()) for o in organs}
    _name_organs(chart, middles)
    for n, model in enumerate(comparison.models):
        name = comparison.short[model.name]
        own = [row for row in rows if row["model"] == model.name]
        for row in own:
            tip = f"{name}, {row['case']}, {spaced(row['name'])}: {row['dice']:.3f}"
            chart.point(row["reference_ml"], row["dice"], n, tip, size=2.5, faint=True)
    for n, model in enumerate(comparison.models):
        for organ, volume in middles.items():
            found = [r["dice"] for r in rows if (r["model"], r["name"]) == (model.name, organ)]
            if found:
                tip = f"{comparison.short[model.name]}, {spaced(organ)}: median {median(found):.3f}"
                chart.point(volume, median(found), n, tip)
    return chart.svg()


def _name_organs(chart: Chart, middles: dict[str, float]) -> None:
    """Names above the plot at the organs' sizes, in as many lines as they need."""
    ends: list[float] = []  # of each line, from the lowest
    notes: list[tuple[float, float, str]] = []
    for organ, volume in sorted(middles.items(), key=lambda item: item[1]):
        px = chart.place(volume, 0)[0]
        half = 3.5 * len(organ)
        line = next((n for n, end in enumerate(ends) if px - half > end), len(ends))
        ends[line:] = [px + half + 8, *ends[line + 1 :]]
        notes.append((px, chart.inside[1] - 6 - 15 * line, spaced(organ)))
        chart.guide(volume, notes[-1][1] + 4)
    for note in notes:  # on top of all guides
        chart.note(*note)


def _stairs(front: list[tuple[float, float]], end: float) -> list[tuple[float, float]]:
    """What can be had at a cost: level until the next model of the front can be paid for."""
    steps = []
    for (cost, worth), (following, _) in zip(front, [*front[1:], (end, 0.0)], strict=True):
        steps += [(cost, worth), (following, worth)]
    return steps


def _limits(measure: str) -> tuple[float, float]:
    return (0, 1) if measure in ("dice", "nsd") else (0, float("inf"))

"""The page of a comparison: one HTML file with its figures within, that needs no network and no script."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path

from PIL import Image

from medseg3d.compare.figures import organ_plot, pareto_plot, size_plot
from medseg3d.compare.pictures import Example, colors_of, examples
from medseg3d.compare.result import Comparison, spaced
from medseg3d.compare.style import CSS
from medseg3d.compare.summary import Summary
from medseg3d.compare.tables import Cell, Table, cost_table, facts, heading, organ_tables, pair_table
from medseg3d.io import write_text
from medseg3d.report.drawing import MISSED, WRONG
from medseg3d.report.svg import legend
from medseg3d.version import __version__

_MARKS = (
    'Green: the best. <span class="alike">Marked</span>: cannot be told from it '
    "(Wilcoxon signed rank test, p ≥ 0.05 after Holm)."
)
_COSTS = {"seconds": "seconds a case", "cpu_seconds": "CPU seconds a case", "gflop": "GFLOP a case"}
_COSTS |= {"peak_memory_mb": "peak memory, MiB"}


def write_page(comparison: Comparison, summary: Summary, path: Path) -> Path:
    """Write the page, atomically. The scans, references and segmentations of two cases are read for its pictures."""
    return write_text(path, page(comparison, summary))


def page(comparison: Comparison, summary: Summary) -> str:
    """The page as HTML."""
    title = escape(heading(comparison))
    parts = [
        f"<h1>{title}</h1>",
        *(f'<p class="muted">{escape(fact)}</p>' for fact in facts(comparison)),
        *_costs(comparison, summary),
        *_organs(comparison, summary),
        *_sizes(comparison),
        *_tables(pair_table(comparison, summary)),
        *_examples(comparison),
        *_notes(comparison),
        f'<p class="note">Written by medseg3d {escape(__version__)}.</p>',
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title}</title><style>{CSS}</style>"
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(parts) + "\n</body></html>\n"


def _costs(comparison: Comparison, summary: Summary) -> Iterator[str]:
    yield from _tables(cost_table(comparison, summary), _MARKS if len(comparison.models) > 1 else "")
    costs = (comparison.clock, "gflop", "peak_memory_mb")
    plots = [pareto_plot(comparison, summary, cost, _COSTS[cost]) for cost in costs]
    figures = "".join(f"<figure>{plot}</figure>" for plot in plots if plot is not None)
    if figures:
        yield f'<div class="plots three">{figures}</div>'
        yield (
            '<p class="note">Bars are 95 % intervals. Dashed: the best mean Dice that can be had at a cost. '
            "Rest the mouse on a mark for its figures.</p>"
        )


def _organs(comparison: Comparison, summary: Summary) -> Iterator[str]:
    yield "<h2>Organ by organ</h2>"
    names = legend(list(comparison.short.values()))
    plots = [organ_plot(comparison, summary, measure) for measure in ("dice", "hd95_mm")]
    figures = "".join(f"<figure>{plot}</figure>" for plot in plots if plot is not None)
    if figures:
        yield f'{names}<div class="plots">{figures}</div>'
    for table in organ_tables(comparison, summary):
        yield f"<h3>{escape(table.title)}</h3>{_table(table)}"


def _sizes(comparison: Comparison) -> Iterator[str]:
    plot = size_plot(comparison)
    if plot is not None:
        yield "<h2>Small organs and large ones</h2>"
        yield legend(list(comparison.short.values()))
        yield f"<figure>{plot}</figure>"
        yield '<p class="note">Small marks are single cases; large ones each organ\'s medians, from small to large.</p>'


def _tables(table: Table, note: str = "") -> Iterator[str]:
    if table.rows:
        yield f"<h2>{escape(table.title)}</h2>{_table(table)}"
        yield f'<p class="note">{note}</p>' if note else ""


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in table.rows)
    look = ' class="means"' if table.last_is_mean else ""
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return f'<div class="wide"><table{look}><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{note}'


def _cell(cell: Cell) -> str:
    detail = f"<small>{escape(cell.detail)}</small>" if cell.detail else ""
    look = ' class="best"' if cell.best else ""
    text = f'<span class="alike">{escape(cell.text)}</span>' if cell.alike else escape(cell.text)
    return f"<td{look}>{text}{detail}</td>"


def _examples(comparison: Comparison) -> Iterator[str]:
    found = list(examples(comparison))
    if not found:
        return
    yield "<h2>Slices</h2>"
    organs = [_swatch(color, spaced(comparison.labels[number])) for number, color in colors_of(comparison).items()]
    errors = [_swatch(MISSED, "missed"), _swatch(WRONG, "too much, or another organ")]
    yield f'<p class="legend">{"".join(organs)}</p><p class="legend">Errors: {"".join(errors)}</p>'
    for example in found:
        yield f"<h3>{escape(example.title)}</h3>"
        yield from _slices(example, {"reference": "reference", **comparison.short})


def _slices(example: Example, names: Mapping[str, str]) -> Iterator[str]:
    for row in example.rows:
        figures = "".join(
            f'<figure><img alt="{escape(row.caption)}, {escape(names[name])}" src="{_data_uri(picture)}">'
            f"<figcaption>{escape(names[name])}</figcaption></figure>"
            for name, picture in row.pictures.items()
        )
        yield f'<p class="muted">{escape(row.caption)}</p><div class="slices">{figures}</div>'


def _notes(comparison: Comparison) -> Iterator[str]:
    failures = [f"{row['model']} failed on {row['case'] or 'all cases'}: {row['error']}" for row in comparison.failures]
    if comparison.notes or failures:
        entries = "".join(f"<li>{escape(note)}</li>" for note in [*failures, *comparison.notes])
        yield f"<h2>Notes</h2><ul>{entries}</ul>"


def _swatch(color: tuple[int, int, int], name: str) -> str:
    red, green, blue = color
    return f'<span><i class="swatch" style="background:rgb({red},{green},{blue})"></i> {escape(name)}</span>'


def _data_uri(picture: Image.Image) -> str:
    """A picture within the page, in 256 colours of its own: a third of the size and hardly another look."""
    buffer = io.BytesIO()
    picture.quantize(256, dither=Image.Dither.NONE).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()

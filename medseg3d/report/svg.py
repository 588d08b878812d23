"""Plots as SVG text: axes, points, error bars, lines and names that keep out of each other's way.

Colours are CSS variables with defaults, so that a page may set others for a dark screen; series differ in shape too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, inf, log10

Box = tuple[float, float, float, float]  # left, top, right, bottom

# Colours of the series on a light and on a dark page.
LIGHT = ("#0969da", "#d1440c", "#1a7f37", "#8250df", "#9a6700", "#bf3989", "#0b7a8a", "#57606a")
DARK = ("#58a6ff", "#ff8f5a", "#56d364", "#bc8cff", "#e3b341", "#ff7eb6", "#39c5cf", "#a0a8b0")

STYLE = (
    ".chart{font:12px system-ui,sans-serif;max-width:100%;height:auto}"
    ".chart text{fill:var(--ink,#1f2328)}.chart .tick,.chart .title{fill:var(--muted,#59636e)}"
    ".chart .title{font-size:13px}.chart .grid{stroke:var(--grid,#d8dee4);stroke-width:1}"
    ".chart .front{fill:none;stroke:var(--muted,#59636e);stroke-width:1.5;stroke-dasharray:4 4}"
    ".chart .guide{stroke:var(--muted,#59636e);stroke-dasharray:1 3}.chart .bar{stroke-width:1.5}"
    ".chart .faint{opacity:.28}"
    ".chart .halo{stroke:var(--page,#fff);stroke-width:3px;paint-order:stroke;stroke-linejoin:round}"
    + "".join(
        f".chart .f{n}{{fill:var(--s{n},{c})}}.chart .l{n}{{stroke:var(--s{n},{c})}}" for n, c in enumerate(LIGHT)
    )
)

# Shapes of the marks, within a circle of radius 1.
_SHAPES = (
    None,  # a circle
    ((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)),
    ((0, -1.1), (1.05, 0.8), (-1.05, 0.8)),
    ((0, -1.25), (1.05, 0), (0, 1.25), (-1.05, 0)),
    ((0, 1.1), (1.05, -0.8), (-1.05, -0.8)),
    ((-0.4, -1.1), (0.4, -1.1), (0.4, -0.4), (1.1, -0.4), (1.1, 0.4), (0.4, 0.4), (0.4, 1.1), (-0.4, 1.1),
     (-0.4, 0.4), (-1.1, 0.4), (-1.1, -0.4), (-0.4, -0.4)),
    ((0, -1.15), (1.1, -0.35), (0.68, 0.95), (-0.68, 0.95), (-1.1, -0.35)),
    ((-1.1, 0), (-0.55, -0.95), (0.55, -0.95), (1.1, 0), (0.55, 0.95), (-0.55, 0.95)),
)  # fmt: skip
_LETTER = 6.6  # width of a letter, and the height of a line, at 12 px
_LINE = 14.0
_STEPS = (1, 2, 2.5, 5, 10)


@dataclass(frozen=True)
class Axis:
    """From ``low`` to ``high``; ``marks`` (value, text) instead of round numbers; ``log`` for values above 0."""

    title: str
    low: float
    high: float
    log: bool = False
    marks: tuple[tuple[float, str], ...] | None = None

    @classmethod
    def around(
        cls, title: str, values: Iterable[float], log: bool = False, within: tuple[float, float] = (-inf, inf)
    ) -> Axis:
        """An axis with some space around values, of which there may be none, not beyond ``within``."""
        known = [value for value in values if value > 0 or not log] or [1.0]
        if log:
            low, high = min(known), max(known)
            room = max((high / low) ** 0.12, 1.25)
            return cls(title, low / room, high * room, log=True)
        low, high = min(known), max(known)
        room = max((high - low) * 0.08, abs(high) * 0.01, 1e-3)
        return cls(title, max(low - room, within[0]), min(high + room, within[1]))

    def share(self, value: float) -> float:
        """Where a value lies between both ends, 0 to 1; values beyond them at the ends."""
        if self.log:
            place = (log10(max(value, self.low)) - log10(self.low)) / (log10(self.high) - log10(self.low))
        else:
            place = (value - self.low) / (self.high - self.low)
        return min(1.0, max(0.0, place))

    def ticks(self) -> list[tuple[float, str]]:
        """Values with their text: the marks, or round numbers, about six."""
        if self.marks is not None:
            return list(self.marks)
        if self.log:
            return [(value, _number(value)) for value in _log_ticks(self.low, self.high)]
        rough = (self.high - self.low) / 6
        unit = 10.0 ** floor(log10(rough))
        step = unit * next(factor for factor in _STEPS if factor * unit >= rough * 0.999)
        first, last = ceil(self.low / step - 1e-9), floor(self.high / step + 1e-9)
        return [(n * step, _number(n * step)) for n in range(first, last + 1)]


class Chart:
    """A plot that is drawn mark by mark; the plot's text comes from :meth:`svg`.

    Args:
        x, y: what lies along both axes.
        size: width and height in pixels.
        name: what the plot shows, for those who cannot see it.
        left: room for the texts at the left.
        head: room above, such as for names there.
    """

    def __init__(
        self, x: Axis, y: Axis, size: tuple[int, int] = (560, 380), name: str = "", left: int = 56, head: int = 12
    ) -> None:
        self.x, self.y, self.size, self.name = x, y, size, name
        self.inside: Box = (left, head, size[0] - 14, size[1] - 46)
        self._marks: list[str] = []
        self._labels: list[tuple[float, float, str, int]] = []
        self._taken: list[Box] = []

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Pixels of a value."""
        left, top, right, bottom = self.inside
        return left + self.x.share(x) * (right - left), bottom - self.y.share(y) * (bottom - top)

    def point(self, x: float, y: float, series: int, tip: str = "", size: float = 5.0, faint: bool = False) -> None:
        """A mark in the colour and shape of a series; ``tip`` is shown where the mouse rests on it."""
        px, py = self.place(x, y)
        shape = _SHAPES[series % len(_SHAPES)]
        look = f'class="f{series % len(LIGHT)}{" faint" if faint else ""}"'
        inner = f"<title>{escape(tip)}</title>" if tip else ""
        if shape is None:
            self._marks.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="{size:g}" {look}>{inner}</circle>')
        else:
            corners = " ".join(f"{px + size * a:.1f},{py + size * b:.1f}" for a, b in shape)
            self._marks.append(f'<polygon points="{corners}" {look}>{inner}</polygon>')
        if not faint:
            self._taken.append((px - size, py - size, px + size, py + size))

    def guide(self, x: float, top: float) -> None:
        """A dotted line at a value, from the pixel row ``top`` down to the axis."""
        px = self.place(x, self.y.low)[0]
        self._marks.append(f'<line x1="{px:.1f}" y1="{top:.1f}" x2="{px:.1f}" y2="{self.inside[3]}" class="guide"/>')

    def bar(self, first: tuple[float, float], last: tuple[float, float], series: int) -> None:
        """An error bar from one place to another."""
        (x0, y0), (x1, y1) = self.place(*first), self.place(*last)
        line = f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"'
        self._marks.append(f'{line} class="bar l{series % len(LIGHT)}"/>')

    def dashes(self, places: Sequence[tuple[float, float]]) -> None:
        """A dashed line through places, of no series."""
        corners = " ".join("{:.1f},{:.1f}".format(*self.place(*place)) for place in places)
        self._marks.append(f'<polyline points="{corners}" class="front"/>')

    def label(self, x: float, y: float, text: str, series: int) -> None:
        """A name beside a place, put where it covers least."""
        self._labels.append((*self.place(x, y), text, series))

    def note(self, x: float, y: float, text: str, anchor: str = "middle") -> None:
        """Small text with its baseline at pixels, ``anchor`` start, middle or end."""
        self._marks.append(_text(text, "tick halo", anchor, x, y))

    def svg(self) -> str:
        """The plot as text; the style is that of the page, see ``STYLE``."""
        width, height = self.size
        parts = [f'<svg class="chart" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img"']
        parts.append(f' aria-label="{escape(self.name)}" xmlns="http://www.w3.org/2000/svg">')
        return "".join([*parts, *self._axes(), *self._marks, *self._placed_labels(), "</svg>"])

    def _axes(self) -> list[str]:
        left, top, right, bottom = self.inside
        parts = []
        for value, text in self.x.ticks():
            px = self.place(value, self.y.low)[0]
            parts.append(f'<line x1="{px:.1f}" y1="{top}" x2="{px:.1f}" y2="{bottom}" class="grid"/>')
            parts.append(_text(text, "tick", "middle", px, bottom + 16))
        for value, text in self.y.ticks():
            py = self.place(self.x.low, value)[1]
            parts.append(f'<line x1="{left}" y1="{py:.1f}" x2="{right}" y2="{py:.1f}" class="grid"/>')
            parts.append(_text(text, "tick", "end", left - 7, py + 4))
        parts.append(_text(self.x.title, "title", "middle", (left + right) / 2, bottom + 37))
        turned = f'<g transform="translate(14 {(top + bottom) / 2:.1f}) rotate(-90)">'
        return [*parts, turned, _text(self.y.title, "title", "middle", 0, 0), "</g>"]

    def _placed_labels(self) -> list[str]:
        taken, parts = list(self._taken), []
        for px, py, text, series in self._labels:
            anchor, box = min(self._candidates(px, py, text), key=lambda one: self._covered(one[1], taken))
            taken.append(box)
            x = {"start": box[0], "middle": (box[0] + box[2]) / 2, "end": box[2]}[anchor]
            parts.append(_text(text, f"halo f{series % len(LIGHT)}", anchor, x, box[3] - 3.5))
        return parts

    def _candidates(self, px: float, py: float, text: str) -> list[tuple[str, Box]]:
        """Anchors and boxes for a name around a point, the first ones clear of lines that go on from it."""
        wide, high, gap = len(text) * _LETTER, _LINE, 8.0
        heights = (py - high - 3, py + 3, py - high / 2, py - 2 * high - 3, py + high + 3)
        boxes = [
            (anchor, (x, y, x + wide, y + high))
            for y in heights
            for anchor, x in (("start", px + gap), ("end", px - gap - wide))
        ]
        above = ("middle", (px - wide / 2, py - gap - high, px + wide / 2, py - gap))
        return [*boxes, above]

    def _covered(self, box: Box, taken: Sequence[Box]) -> float:
        """Square pixels of a box that cover others, or lie outside of the plot."""
        area = (box[2] - box[0]) * (box[3] - box[1])
        return area - _common(box, self.inside) + sum(_common(box, other) for other in taken)


def legend(names: Sequence[str]) -> str:
    """The series' marks with their names, as HTML in one line."""
    entries = []
    for series, name in enumerate(names):
        chart = Chart(Axis("", 0, 1), Axis("", 0, 1), (14, 14))
        chart.inside = (0, 0, 14, 14)
        chart.point(0.5, 0.5, series)
        mark = f'<svg class="chart" viewBox="0 0 14 14" width="14" height="14">{chart._marks[0]}</svg>'
        entries.append(f"<span>{mark} {escape(name)}</span>")
    return f'<p class="legend">{"".join(entries)}</p>'


def pareto_front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (cost, worth) those that no other beats in one without being beaten in the other, by cost."""
    front: list[tuple[float, float]] = []
    for cost, worth in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or worth > front[-1][1]:
            front.append((cost, worth))
    return front


def _text(text: str, look: str, anchor: str, x: float, y: float) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{look}">{escape(text)}</text>'


def _common(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 10, ... ; with 2 and 5 where these are few; about six round numbers where the ends lie close."""
    decades = range(floor(log10(low)), ceil(log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), tuple(n / 10 for n in range(10, 100))):
        values = [factor * 10.0**n for n in decades for factor in factors]
        found = [value for value in values if low <= value <= high]
        if len(found) >= 3:
            break
    return found[:: 1 + len(found) // 8]


def _number(value: float) -> str:
    """12000 as 12 000, without digits that say nothing."""
    text = f"{value:.10g}"
    if "e" in text:
        return f"{value:.0e}"
    return f"{round(value):,}".replace(",", "\u202f") if abs(value) >= 10_000 else text

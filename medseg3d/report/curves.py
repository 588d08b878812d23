"""Loss and validation score of a training run, epoch by epoch, as one picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw

from medseg3d.report.drawing import BACKGROUND, FAINT, MUTED, TEXT, Color, font

LOSS: Color = (88, 166, 255)
SCORE: Color = (126, 231, 135)
_SIZE = (560, 300)  # of one panel, in pixels
_MARGINS = (58, 40, 18, 34)  # left, top, right, bottom
_FINER = 2  # drawn this much larger and reduced, which smooths the lines


def draw_curves(rows: Sequence[Mapping[str, Any]], metric: str = "validation") -> Image.Image:
    """The picture (RGB): the loss on the left, the validation score on the right.

    Args:
        rows: an epoch each, with "epoch", "loss" and "validation" (None where it was not validated).
        metric: what the score is called.
    """
    width, height = _SIZE
    picture = Image.new("RGB", (2 * width, height), BACKGROUND)
    epochs = [row["epoch"] for row in rows] or [1]
    for n, (title, key, color) in enumerate((("loss", "loss", LOSS), (metric, "validation", SCORE))):
        points = [(row["epoch"], row[key]) for row in rows if row[key] is not None and math.isfinite(row[key])]
        picture.paste(_panel(title, points, (min(epochs), max(epochs)), color), (n * width, 0))
    return picture


def _panel(title: str, points: Sequence[tuple[float, float]], epochs: tuple[float, float], color: Color) -> Image.Image:
    width, height = (size * _FINER for size in _SIZE)
    left, top, right, bottom = (margin * _FINER for margin in _MARGINS)
    panel = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(panel)
    ticks = nice_ticks([value for _, value in points])
    low, high = ticks[0], ticks[-1]
    first, last = epochs

    def place(epoch: float, value: float) -> tuple[float, float]:
        x = left + (epoch - first) / max(last - first, 1) * (width - left - right)
        return x, height - bottom - (value - low) / (high - low) * (height - top - bottom)

    small = font(12 * _FINER)
    for tick in ticks:
        _, y = place(first, tick)
        draw.line([(left, y), (width - right, y)], FAINT, _FINER)
        draw.text((left - 8 * _FINER, y), f"{tick:.4g}", MUTED, small, anchor="rm")
    for epoch in sorted({first, last}):
        draw.text((place(epoch, low)[0], height - bottom + 8 * _FINER), f"{epoch:.0f}", MUTED, small, anchor="mt")
    draw.text(((left + width - right) / 2, height - bottom + 8 * _FINER), "epoch", MUTED, small, anchor="mt")
    draw.text((left, 12 * _FINER), title, TEXT, font(15 * _FINER), anchor="lt")
    places = [place(*point) for point in points]
    if places:
        draw.text((width - right, 12 * _FINER), f"{points[-1][1]:.4g}", color, font(15 * _FINER), anchor="rt")
        draw.line(places, color, 2 * _FINER, joint="curve")
        for x, y in places if len(places) <= 40 else places[-1:]:
            draw.circle((x, y), 3 * _FINER, color)
    return panel.reduce(_FINER)


def nice_ticks(values: Sequence[float]) -> list[float]:
    """Three to seven round numbers that enclose the values; 0 and 1 without any."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if high - low < 1e-6 * max(abs(low), abs(high), 1e-6):
        low, high = low - 0.05 * max(abs(low), 1.0), high + 0.05 * max(abs(high), 1.0)
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 12) for n in range(first, max(last, first + 1) + 1)]

"""The picture of a training run."""

from __future__ import annotations

import numpy as np
import pytest

from medseg3d.report.curves import LOSS, SCORE, draw_curves, nice_ticks


def colored(picture, color):
    """Rows and columns of the pixels of about this colour."""
    return np.nonzero((np.abs(np.asarray(picture).astype(int) - color) < 25).all(axis=-1))


def rows(losses, scores):
    pairs = enumerate(zip(losses, scores, strict=True), start=1)
    return [{"epoch": epoch, "loss": loss, "validation": score} for epoch, (loss, score) in pairs]


def test_a_falling_loss_falls_and_a_rising_score_rises():
    picture = draw_curves(rows([3, 2, 1], [None, 0.2, 0.6]), "dice")
    middle = picture.width / 2
    for color, falls in ((LOSS, True), (SCORE, False)):
        y, x = colored(picture, color)
        line = y > 40  # below the title
        y, x = y[line], x[line]
        assert ((x < middle) if falls else (x > middle)).all() and len(x) > 100
        assert (y[x.argmin()] < y[x.argmax()]) == falls


@pytest.mark.parametrize("given", [rows([], []), rows([1.0], [None]), rows([float("nan"), 2.0], [0.5, 0.5])])
def test_few_or_odd_figures_make_a_picture_too(given):
    assert draw_curves(given).size == draw_curves(rows([3, 2], [0, 1])).size


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.0, 1.0], [0, 0.5, 1]),
        ([0.12, 0.71], [0, 0.2, 0.4, 0.6, 0.8]),
        ([330.0, 1200.0], [0, 500, 1000, 1500]),
        ([], [0, 0.5, 1]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(values, ticks):
    assert nice_ticks(values) == pytest.approx(ticks)


def test_ticks_of_one_value():
    ticks = nice_ticks([2.0, 2.0])
    assert ticks[0] < 2 < ticks[-1]

"""Errors on a plane: what was missed, what is too much, and what is right."""

from __future__ import annotations

import numpy as np

from medseg3d.report.drawing import MISSED, WRONG, draw_errors, draw_plane
from medseg3d.report.planes import Cut

GREEN = (0, 160, 0)
WINDOW = (0.0, 400.0)
SIZE = (200, 200)


def squares(*places, label=1):
    """(40, 40) with 10 x 10 squares whose corners are at these places."""
    label_map = np.zeros((40, 40), np.uint8)
    for row, column in places:
        label_map[row : row + 10, column : column + 10] = label
    return label_map


def pixel(picture, row, column):
    """At the centre of a voxel, five pixels wide."""
    return np.array(picture)[round(5 * row + 2), round(5 * column + 2)].astype(int)


def errors(predicted, reference, colors):
    plane = Cut(np.zeros((40, 40), np.float32), predicted, (0, 0, 40, 40))
    return draw_errors(plane, reference, SIZE, colors, WINDOW)


def near(color, wanted, tolerance=60):
    return np.abs(color - np.array(wanted)).max() <= tolerance


def test_each_error_has_its_colour():
    picture = errors(squares((5, 5), (25, 5)), squares((5, 5), (5, 25)), {1: GREEN})
    grey = pixel(picture, 35, 35)
    assert near(pixel(picture, 10, 30), MISSED) and near(pixel(picture, 30, 10), WRONG)
    assert (pixel(picture, 10, 10) == grey).all(), "what is right is not filled"
    assert any(near(color, GREEN) for color in np.array(picture)[52, 23:29].astype(int)), "but has an outline"


def test_another_organ_is_wrong():
    picture = errors(squares((5, 5), label=2), squares((5, 5)), {1: GREEN, 2: (0, 0, 255)})
    assert near(pixel(picture, 10, 10), WRONG)


def test_organs_without_a_colour_do_not_count():
    picture = errors(squares((5, 5), label=2), squares((5, 25)), {})
    plain = draw_plane(Cut(np.zeros((40, 40), np.float32), squares(), (0, 0, 40, 40)), SIZE, {}, WINDOW)
    assert (np.array(picture) == np.array(plain)).all()


def test_inputs_stay_as_they_were():
    predicted, reference = squares((5, 5)), squares((5, 6))
    before = predicted.copy(), reference.copy()
    errors(predicted, reference, {1: GREEN})
    assert (predicted == before[0]).all() and (reference == before[1]).all()

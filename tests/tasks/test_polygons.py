from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from medseg3d.tasks import polygons


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), shape=st.tuples(st.integers(1, 14), st.integers(1, 14)))
def test_tracing_and_filling_give_the_mask_back(seed, shape):
    rng = np.random.default_rng(seed)
    mask = rng.random(shape) < rng.choice([0, 0.2, 0.5, 0.8, 1])
    traced = polygons.trace(mask)
    np.testing.assert_array_equal(polygons.fill(traced, shape), mask)
    assert len(traced) == ndimage.label(mask)[1]


def test_a_ring_by_hand():
    mask = np.pad(np.ones((3, 3), bool), 1)
    assert polygons.trace(mask)[0].tolist() == [[1, 1], [4, 1], [4, 4], [1, 4]]
    mask[2, 2] = False
    (ring,) = polygons.trace(mask)
    assert len(ring) == 4 + 1 + 4 + 1, "the hole, and the way to it and back"
    np.testing.assert_array_equal(polygons.fill([ring], (5, 5)), mask)


def test_polygons_add_up_and_are_cut_at_the_image():
    square, other = [0, 0, 4, 0, 4, 4, 0, 4], np.array([(2, 2), (6, 2), (6, 6), (2, 6)])
    filled = polygons.fill([square, other], (5, 5))
    expected = np.zeros((5, 5), bool)
    expected[:4, :4] = expected[2:, 2:] = True
    np.testing.assert_array_equal(filled, expected)
    assert polygons.fill([[-9, -9, 20, -9, 20, 20, -9, 20]], (4, 6)).all()
    assert not polygons.fill([[50, 50, 60, 50, 60, 60]], (4, 6)).any()
    assert not polygons.fill([], (4, 6)).any()


def test_what_has_no_area_is_empty():
    assert not polygons.fill([[1, 1, 5, 1, 3, 1]], (6, 6)).any()
    assert not polygons.fill([[2, 2, 2, 2, 2, 2]], (6, 6)).any()
    assert polygons.trace(np.zeros((3, 4))) == []
    assert polygons.fill(polygons.trace(np.ones((1, 1))), (1, 1)).all(), "one pixel"


def test_direction_and_a_repeated_first_corner_do_not_matter():
    corners = np.array([(1.2, 0.7), (8.4, 2.9), (5.5, 9.1), (0.4, 6.6)])
    mask = polygons.fill([corners], (10, 10))
    for same in (corners[::-1], np.concatenate([corners, corners[:1]]), np.roll(corners, 2, axis=0)):
        np.testing.assert_array_equal(polygons.fill([same], (10, 10)), mask)


def test_refusals():
    for wrong in ([1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7], [[1, 2], [3, 4]], [1, 2, 3, 4, 5, np.nan]):
        with pytest.raises(ValueError, match="three or more corners"):
            polygons.fill([wrong], (5, 5))
    with pytest.raises(ValueError, match="two axes"):
        polygons.trace(np.ones((2, 2, 2)))

import numpy as np
import pytest

from medseg3d.io.stack import fill, same_positions, stack_slices

Z = np.array([0.0, 0, 1])


def positions(*z, lean=0.0):
    return np.array([(5.0, 7 + lean * at, at) for at in z])


def test_even_slices_are_left_alone():
    stack = stack_slices(positions(*np.arange(10) * 2.5 - 3), Z)
    np.testing.assert_allclose(stack.first, (5, 7, -3))
    np.testing.assert_allclose(stack.step, (0, 0, 2.5))
    np.testing.assert_array_equal(stack.index, np.arange(10))
    assert stack.notes == ()


def test_positions_rounded_in_the_file_count_as_even():
    stack = stack_slices(positions(*np.round(np.arange(50) * 0.625, 1)), Z)
    np.testing.assert_array_equal(stack.index, np.arange(50))
    assert stack.notes == ()
    stack = stack_slices(positions(*np.delete(np.round(np.arange(50) * 0.625, 1), 20)), Z)
    assert len(stack.index) == 50 and stack.notes[0].startswith("1 missing slice ")


def test_a_tilt_is_kept_as_shear():
    stack = stack_slices(positions(0, 3, 6, 9, lean=np.tan(np.radians(12))), Z)
    np.testing.assert_allclose(stack.step, (0, 3 * np.tan(np.radians(12)), 3))
    assert len(stack.notes) == 1 and stack.notes[0].startswith("gantry tilt of 12.0 degrees: kept as a sheared grid")


def test_missing_slices_are_filled_and_the_others_kept():
    stack = stack_slices(positions(0, 3, 6, 12, 15, 18, 21, 27), Z)
    np.testing.assert_allclose(stack.index, [0, 1, 2, 2.5, 3, 4, 5, 6, 6.5, 7])
    assert stack.notes == ("2 missing slices filled by linear interpolation (gap of 6.0 mm)",)


def test_uneven_slices_are_put_on_an_even_grid():
    stack = stack_slices(positions(0, 4, 8, 9, 16, 20), Z)
    assert len(stack.index) == 6 and stack.index[0] == 0 and stack.index[-1] == 5
    z = np.interp(stack.index, range(6), (0, 4, 8, 9, 16, 20))
    np.testing.assert_allclose(z, np.arange(6) * 4)
    assert "slices 1.0 to 7.0 mm apart put on an even grid of 6 slices, 4.00 mm apart" in stack.notes[0]


def test_a_wide_gap_is_refused():
    assert len(stack_slices(positions(0, 5, 15, 20, 25), Z).index) == 6
    with pytest.raises(ValueError, match=r"5\.00 mm apart but there is a gap of 15\.0 mm"):
        stack_slices(positions(0, 5, 20, 25, 30), Z)


def test_slices_that_wander_sideways_are_refused():
    with pytest.raises(ValueError, match=r"shifted sideways by up to 2\.0 mm"):
        stack_slices(positions(0, 5, 10, 15) + np.outer([0, 2, 0, 0], [1, 0, 0]), Z)


def test_same_positions_are_grouped_in_order():
    assert same_positions(np.array([4.0, 0, 4.001, 2])) == [[1], [3], [0, 2]]


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_fill_is_linear_and_keeps_type(dtype):
    images = np.array([0, 10, 25], dtype=dtype)[:, None, None] * np.ones((1, 2, 3), dtype)
    filled = fill(images, np.array([0, 0.5, 1, 1.5, 2]))
    assert filled.dtype == dtype
    half = 18 if dtype == np.int16 else 17.5
    np.testing.assert_array_equal(filled[:, 0, 0], [0, 5, 10, half, 25])

"""Copies of an array in another layout or type."""

from __future__ import annotations

import numpy as np
import pytest

from medseg3d.io.voxels import c_ordered, fortran_order

SHAPES = [(1, 1, 1), (16, 3, 32), (17, 5, 47), (40, 2, 15)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("order", ["C", "F"])
def test_layouts_hold_the_same_voxels(shape, order):
    array = np.random.default_rng(0).integers(-1000, 3000, shape).astype(np.int16, order=order)
    array.flags.writeable = False
    for found, layout in ((fortran_order(array), "F_CONTIGUOUS"), (c_ordered(array, np.float32), "C_CONTIGUOUS")):
        assert found.flags[layout] and np.array_equal(found, array)
    assert c_ordered(array, np.float32).dtype == np.float32 and fortran_order(array).dtype == np.int16


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_c_ordered_copy_is_one_even_where_nothing_changes(order):
    array = np.ones((20, 3, 4), np.float32, order=order)
    c_ordered(array, np.float32)[:] = 5
    assert (array == 1).all()


def test_reversed_and_permuted_views():
    array = np.arange(20 * 18 * 33, dtype=np.int32).reshape(20, 18, 33)[::-1, :, ::2].transpose(2, 0, 1)
    assert np.array_equal(c_ordered(array, np.int32), array) and np.array_equal(fortran_order(array), array)

"""Position tables: what sines and cosines stand where, and interpolation in hand-worked cases."""

from __future__ import annotations

import math

import pytest
import torch

from medseg3d.layers.positions import interpolate_positions, sincos_positions


def ramp(grid, axis):
    """A table of width 1 that counts up along one axis."""
    counts = torch.arange(float(grid[axis])).reshape([-1 if other == axis else 1 for other in range(len(grid))])
    return counts.expand(grid).reshape(1, -1, 1)


@pytest.mark.parametrize("grid", [(3, 4), (3, 4, 5)])
def test_sincos_gives_each_axis_its_share_the_second_axis_first(grid):
    axes, width = len(grid), 8 * len(grid)
    table = sincos_positions(grid, width, temperature=100.0).reshape(*grid, axes, 2, 4)
    for share, axis in enumerate((1, 0, 2)[:axes]):
        index = [0] * axes
        index[axis] = 2
        for frequency in range(4):
            angle = 2 * 100 ** (-frequency / 4)
            sine, cosine = table[(*index, share, slice(None), frequency)].tolist()
            assert (sine, cosine) == pytest.approx((math.sin(angle), math.cos(angle)), abs=1e-6)
        others = [other for other in range(axes) if other != share]
        assert torch.equal(table[tuple(index)][others], table[(0,) * axes][others])


@pytest.mark.parametrize(
    ("grid", "width", "message"),
    [
        ((2, 2, 2), 16, "in 3D need a width that is a multiple of 6, got 16"),
        ((2, 2), 6, "in 2D need a width that is a multiple of 4, got 6"),
        ((8,), 8, r"two or three axes, got \(8,\)"),
    ],
)
def test_sincos_refuses_what_cannot_be_shared_out(grid, width, message):
    with pytest.raises(ValueError, match=message):
        sincos_positions(grid, width)


def test_interpolation_is_linear_between_the_centres_of_the_tokens():
    """Four tokens to eight: centres at -1/4, 1/4, 3/4 ... in units of the old ones, held at the border."""
    grown = interpolate_positions(ramp((4, 1), 0), (4, 1), (8, 1)).flatten().tolist()
    assert grown == pytest.approx([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])
    shrunk = interpolate_positions(ramp((1, 6, 1), 1), (1, 6, 1), (1, 3, 1)).flatten().tolist()
    assert shrunk == pytest.approx([0.5, 2.5, 4.5])


@pytest.mark.parametrize(("old", "new"), [((3, 4), (5, 2)), ((2, 3, 4), (4, 3, 7))])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_axes_are_told_apart(old, new, axis):
    if axis == len(old):
        return
    table = interpolate_positions(ramp(old, axis), old, new).reshape(new)
    along = table.movedim(axis, 0).flatten(1)
    assert torch.allclose(along, along[:, :1])
    if new[axis] != old[axis]:
        assert along[0, 0] < along[-1, 0]


def test_the_same_grid_gives_the_table_itself():
    table = torch.randn(1, 6, 5)
    assert interpolate_positions(table, (2, 3), [2, 3]) is table


def test_dtype_is_kept_and_gradients_flow():
    table = torch.randn(1, 6, 5, dtype=torch.bfloat16, requires_grad=True)
    grown = interpolate_positions(table, (2, 3), (4, 4))
    assert grown.shape == (1, 16, 5) and grown.dtype == torch.bfloat16
    grown.sum().backward()
    assert (table.grad != 0).all()


@pytest.mark.parametrize(
    ("shape", "old", "new", "message"),
    [
        ((1, 7, 5), (2, 3), (4, 4), r"positions of the grid \(2, 3\) have shape \(1, 6, width\), got \(1, 7, 5\)"),
        ((2, 6, 5), (2, 3), (4, 4), r"got \(2, 6, 5\)"),
        ((6, 5), (2, 3), (4, 4), r"got \(6, 5\)"),
        ((1, 6, 5), (2, 3), (4, 4, 4), "the same number each"),
        ((1, 6, 5), (6,), (8,), "two or three axes"),
    ],
)
def test_tables_and_grids_that_do_not_fit(shape, old, new, message):
    with pytest.raises(ValueError, match=message):
        interpolate_positions(torch.zeros(shape), old, new)

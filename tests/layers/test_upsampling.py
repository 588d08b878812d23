"""Bilinear upsampling as a transposed convolution, and unpooling."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from medseg3d.layers.upsampling import BilinearUpsampling, bilinear_weight, tent, unpool


def test_tents():
    torch.testing.assert_close(tent(3), torch.tensor([0.5, 1, 0.5], dtype=torch.double))
    torch.testing.assert_close(tent(4), torch.tensor([0.25, 0.75, 0.75, 0.25], dtype=torch.double))
    for factor in (2, 8, 16, 32):  # each fine entry between two coarse ones gets a whole
        for size in (2 * factor - 1, 2 * factor):
            taps = torch.cat([tent(size), tent(size).new_zeros(2 * factor - size)])
            torch.testing.assert_close(taps.view(2, factor).sum(0), torch.ones(factor, dtype=torch.double))


def test_no_class_leaks_into_another():
    weight = bilinear_weight(3, 4)
    assert torch.equal(weight[0, 0], weight[2, 2]) and not weight[0, 1].any() and not weight[2, 0].any()


@pytest.mark.parametrize("factor", [2, 8, 32])
def test_it_interpolates(factor):
    x = torch.randn(2, 3, 4, 5)
    y = BilinearUpsampling(3, 2 * factor, factor)(F.pad(x, (1, 1, 1, 1), mode="replicate"))
    cut = factor + factor // 2
    expected = F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)
    torch.testing.assert_close(y[:, :, cut:-cut, cut:-cut], expected)


def test_an_odd_kernel_keeps_the_coarse_values():
    x = torch.randn(1, 2, 4, 5)
    y = BilinearUpsampling(2, 15, 8)(x)
    torch.testing.assert_close(y[:, :, 7::8, 7::8], x)


def test_fixed_and_learned_weights_have_the_same_key():
    fixed, learned = BilinearUpsampling(2, 4, 2), BilinearUpsampling(2, 4, 2, learned=True)
    assert not list(fixed.parameters()) and [p.shape for p in learned.parameters()] == [(2, 2, 4, 4)]
    learned.weight.data.normal_()
    fixed.load_state_dict(learned.state_dict())
    x = torch.randn(1, 2, 3, 3)
    assert torch.equal(fixed(x), learned(x))
    with pytest.raises(ValueError, match="by 2 has a kernel of 4 or 3, got 5"):
        BilinearUpsampling(2, 5, 2)


@pytest.mark.parametrize("axes", [2, 3])
def test_unpooling_puts_values_where_they_came_from(axes):
    x = torch.randn(2, 3, *[6] * axes)
    pooled, switches = getattr(F, f"max_pool{axes}d")(x, 2, return_indices=True)
    y = unpool(pooled, switches, x.shape[2:])
    torch.testing.assert_close(y, getattr(F, f"max_unpool{axes}d")(pooled, switches, 2))
    assert torch.equal(y[y != 0], x[y != 0]) and (y != 0).sum() == pooled.numel()


def test_unpooling_of_odd_sizes_and_its_gradient():
    x = torch.randn(1, 2, 5, 7, dtype=torch.double, requires_grad=True)
    pooled, switches = F.max_pool2d(x.detach(), 2, return_indices=True, ceil_mode=True)
    assert unpool(pooled, switches, (5, 7)).shape == x.shape
    values = pooled.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: unpool(v, switches, (5, 7)), values)
    with pytest.raises(ValueError, match="a switch for each value"):
        unpool(pooled, switches[:, :1], (5, 7))

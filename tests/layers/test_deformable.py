"""Deformable convolution: stored values of torchvision, and what it is with offsets that are known."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from medseg3d.layers.deformable import DeformConv2d, deform_conv2d
from tests.parity.golden2d import check


@pytest.mark.parametrize("case", range(4))
def test_outputs_and_gradients_are_those_of_torchvision(case, shared):
    folder = shared("golden", "2d", "ops")
    settings = json.loads((folder / "deform_conv.json").read_text())["cases"][case]
    stored = np.load(folder / "deform_conv.npz")
    names = ["x", "offset", "weight", "bias", *(["mask"] if settings["mask"] else [])]
    tensors = {name: torch.from_numpy(stored[f"c{case}_{name}"]).requires_grad_(name != "bias") for name in names}
    geometry = (tuple(np.broadcast_to(settings[name], 2).tolist()) for name in ("stride", "pad", "dil"))
    y = deform_conv2d(*(tensors[name] for name in names[:4]), *geometry, mask=tensors.get("mask"))
    check(y.detach().numpy(), stored[f"c{case}_out"], 1e-4)
    y.square().sum().backward()
    for name in set(names) - {"bias"}:
        check(tensors[name].grad.numpy(), stored[f"c{case}_grad_{name}"], 1e-3, name)


@pytest.mark.parametrize(
    "geometry", [{}, {"stride": 2, "padding": (1, 2)}, {"dilation": (2, 1), "padding": 1, "groups": 2, "bias": False}]
)
def test_without_offsets_it_is_a_convolution(geometry):
    layer = DeformConv2d(4, 6, (3, 2), **geometry)
    x = torch.randn(2, 4, 9, 8)
    expected = F.conv2d(
        x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, geometry.get("groups", 1)
    )
    torch.testing.assert_close(layer(x, torch.zeros(2, 12, *expected.shape[2:])), expected)


def test_whole_offsets_move_the_image():
    x, weight = torch.randn(1, 1, 6, 7), torch.ones(1, 1, 1, 1)
    offset = torch.zeros(1, 2, 6, 7)
    offset[:, 0], offset[:, 1] = 2, -1
    moved = torch.zeros_like(x)
    moved[:, :, :4, 1:] = x[:, :, 2:, :-1]
    torch.testing.assert_close(deform_conv2d(x, offset, weight), moved)


@pytest.mark.parametrize("cast", ["autocast", torch.bfloat16, torch.float16])
def test_in_half_precision_taps_look_where_they_do_in_full_on_wide_maps(cast):
    torch.manual_seed(0)
    layer, x = DeformConv2d(4, 6, 3, padding=1), torch.randn(1, 4, 3, 700)
    offset, mask = torch.zeros(1, 18, 3, 700), torch.ones(1, 9, 3, 700)
    with torch.no_grad():
        exact = F.conv2d(x, layer.weight, layer.bias, padding=1)
        if cast == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                y, moved = layer(x, offset.bfloat16(), mask.bfloat16()), layer(x, offset.bfloat16() + 0.5)
                plain = F.conv2d(x, layer.weight, layer.bias, padding=1)
        else:
            half = copy.deepcopy(layer).to(cast)
            y, moved = half(x.to(cast), offset.to(cast), mask.to(cast)), half(x.to(cast), offset.to(cast) + 0.5)
            plain = F.conv2d(x.to(cast), half.weight, half.bias, padding=1)
        exactly_moved = layer(x, offset + 0.5)
    assert y.isfinite().all() and moved.isfinite().all()
    assert (y - exact).norm() < 2 * (plain - exact).norm()
    assert (moved - exactly_moved).norm() < 2 * (plain - exact).norm()


def test_a_single_voxel():
    y = deform_conv2d(torch.ones(1, 1, 1, 1), torch.full((1, 2, 1, 1), 0.25), torch.ones(1, 1, 1, 1))
    assert y.item() == pytest.approx(0.75**2)


def test_gradients_are_those_of_finite_differences():
    torch.manual_seed(0)
    x, weight = torch.randn(1, 2, 4, 5, dtype=torch.float64), torch.randn(2, 2, 2, 2, dtype=torch.float64)
    offset, mask = torch.rand(1, 8, 3, 4, dtype=torch.float64) * 0.8 + 0.1, torch.rand(1, 4, 3, 4, dtype=torch.float64)
    for tensor in (x, offset, weight, mask):
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(lambda *a: deform_conv2d(*a[:3], mask=a[3]), (x, offset, weight, mask))


@pytest.mark.parametrize(
    ("offset", "mask", "message"),
    [
        ((1, 17, 4, 4), None, "2 \\* 9 channels for each group"),
        ((1, 54, 4, 4), None, "2 \\* 9 channels for each group"),
        ((1, 18, 4, 5), None, "offset must be \\(1, 18, 4, 4\\), got \\(1, 18, 4, 5\\)"),
        ((1, 36, 4, 4), (1, 9, 4, 4), "mask must be \\(1, 18, 4, 4\\)"),
    ],
)
def test_shapes_that_do_not_fit(offset, mask, message):
    x, weight = torch.zeros(1, 4, 6, 6), torch.zeros(2, 4, 3, 3)
    with pytest.raises(ValueError, match=message):
        deform_conv2d(x, torch.zeros(offset), weight, mask=None if mask is None else torch.zeros(mask))


def test_groups_that_do_not_divide():
    with pytest.raises(ValueError, match="groups \\(3\\) must divide"):
        DeformConv2d(4, 6, 3, groups=3)

"""Patches: layout, padding, sizes. The numbers themselves are held by tests/parity."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from medseg3d.layers.patches import (
    MERGING_ORDERS,
    ConvPatchEmbedding,
    PatchConvolution,
    PatchEmbedding,
    PatchMerging,
    patches,
)

CONV = {2: F.conv2d, 3: F.conv3d}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_what_a_patch_holds_in_either_order():
    x = torch.arange(2 * 2 * 4.0).reshape(1, 2, 2, 4)
    assert patches(x, [2, 2], channels_last=False)[0, 0, 1].tolist() == [2, 3, 6, 7, 10, 11, 14, 15]
    assert patches(x, [2, 2], channels_last=True)[0, 0, 1].tolist() == [2, 10, 3, 11, 6, 14, 7, 15]


def test_voxels_behind_the_last_whole_patch_are_left_out():
    x = torch.randn(2, 3, 9, 8, 7)
    whole = patches(x[..., :8, :8, :6], [4, 2, 3], channels_last=True)
    assert torch.equal(patches(x, [4, 2, 3], channels_last=True), whole)


@pytest.mark.parametrize("patch", [(2, 3), (9, 9), (2, 2, 3), (5, 5, 4)])  # small ones and large ones go other ways
@pytest.mark.parametrize("gradients", [False, True])
def test_a_patch_convolution_is_a_convolution(patch, gradients):
    layer = PatchConvolution(3, 5, patch)
    x = torch.randn(2, 3, *(2 * edge for edge in patch))
    for image in (x, x.movedim(1, -1).contiguous().movedim(-1, 1)):
        with torch.set_grad_enabled(gradients):
            tokens = layer(image)
        expected = CONV[len(patch)](x, layer.weight, layer.bias, stride=patch)
        assert tokens.is_contiguous()
        torch.testing.assert_close(tokens, expected.movedim(1, -1))


def test_swin_embedding_pads_with_zeros_at_the_end():
    layer = ConvPatchEmbedding(3, (2, 4, 3), 2, 6, norm=True).eval()
    x = torch.randn(1, 2, 5, 4, 7)
    with torch.no_grad():
        tokens = layer(x)
        assert tokens.shape == (1, 3, 1, 3, 6)
        assert tokens.is_contiguous()
        assert torch.equal(tokens, layer(F.pad(x, (0, 2, 0, 0, 0, 1))))


def test_merging_takes_its_order_at_any_time():
    layer = PatchMerging(4, 3, "mergingv2")
    tokens = torch.randn(1, 4, 3, 2, 4)
    with torch.no_grad():
        outputs = {}
        for order in MERGING_ORDERS:
            layer.order = order
            assert layer.order == order
            outputs[order] = layer(tokens)
            assert outputs[order].shape == (1, 2, 2, 1, 8)
        layer.order = "mergingv2"
        assert torch.equal(layer(tokens), outputs["mergingv2"])
    assert not torch.allclose(outputs["legacy"], outputs["merging"])
    assert not torch.allclose(outputs["mergingv2"], outputs["merging"])
    assert not any("order" in key for key in layer.state_dict())


def test_merging_refuses_another_order():
    layer = PatchMerging(4, 2)
    with pytest.raises(ValueError, match="must be one of legacy, merging, mergingv2, got 'v3'"):
        layer.order = "v3"
    assert layer.order == "merging"


def test_odd_axes_are_merged_with_zeros():
    layer = PatchMerging(4, 2)
    tokens = torch.randn(2, 3, 5, 4)
    with torch.no_grad():
        assert torch.equal(layer(tokens), layer(F.pad(tokens, (0, 0, 0, 1, 0, 1))))


def test_to_grid_is_a_view_in_channels_last():
    embedding = PatchEmbedding(1, (8, 12, 4), 4, 6)
    x = torch.randn(2, 1, 8, 12, 4)
    tokens = embedding(x)
    grid = embedding.to_grid(tokens, x)
    assert grid.shape == (2, 6, 2, 3, 1)
    assert grid.data_ptr() == tokens.data_ptr()
    assert grid.is_contiguous(memory_format=torch.channels_last_3d)
    assert torch.equal(grid[1, :, 1, 2, 0], tokens[1, 5])


def test_positions_for_another_size_are_interpolated():
    embedding = PatchEmbedding(1, (8, 8), 4, 6, spatial_dims=2, interpolate=True).eval()
    with torch.no_grad():
        embedding.patch_embeddings.weight.zero_()
        embedding.patch_embeddings.bias.zero_()
        table = embedding.position_embeddings
        table.copy_(torch.tensor([0.0, 1.0, 2.0, 3.0]).reshape(1, 4, 1).expand(1, 4, 6))
        tokens = embedding(torch.zeros(1, 1, 8, 16))
        # 2 x 2 to 2 x 4: the columns go 0, 1/4, 3/4, 1
        assert tokens[0, :, 0].tolist() == pytest.approx([0, 0.25, 0.75, 1, 2, 2.25, 2.75, 3])
        assert torch.equal(embedding(torch.zeros(1, 1, 8, 8)), table)


def test_positions_that_start_from_zero_and_those_that_stay():
    none = PatchEmbedding(1, 8, 4, 6, pos_embed_type="none").position_embeddings
    assert not none.any() and none.requires_grad
    assert not PatchEmbedding(1, 8, 4, 6, pos_embed_type="sincos").position_embeddings.requires_grad
    learnable = PatchEmbedding(1, 32, 4, 6).position_embeddings
    assert 0.015 < learnable.std() < 0.025


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"proj_type": "mlp"}, "proj_type must be 'conv' or 'perceptron', got 'mlp'"),
        ({"pos_embed_type": "fourier"}, "pos_embed_type must be 'learnable', 'sincos' or 'none', got 'fourier'"),
        ({"img_size": (8, 3)}, r"img_size must hold a patch of \(4, 4\), got \(8, 3\)"),
        ({"img_size": (8, 9), "proj_type": "perceptron"}, r"a multiple of \(4, 4\) along each axis, got \(8, 9\)"),
        ({"img_size": (8, 8, 8)}, "img_size needs one number for each of 2 axes"),
        ({"spatial_dims": 4}, "spatial_dims must be 2 or 3, got 4"),
        ({"pos_embed_type": "sincos", "hidden_size": 6}, "multiple of 4, got 6"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    arguments = {"in_channels": 1, "img_size": 8, "patch_size": 4, "hidden_size": 8, "spatial_dims": 2, **arguments}
    with pytest.raises(ValueError, match=message):
        PatchEmbedding(**arguments)


@pytest.mark.parametrize(
    ("interpolate", "size", "message"),
    [
        (False, (8, 9), r"inputs of \(8, 12\), got \(8, 9\); the next size that it takes is \(8, 12\): pad"),
        (False, (12, 8), r"got \(12, 8\); it takes \(8, 12\) only: cut the input into windows, or build"),
        (False, (8, 12, 4), r"takes 2 spatial axes, got a shape of \(8, 12, 4\)"),
        (True, (7, 13), r"of \(4, 4\), got \(7, 13\); the next size that it takes is \(8, 16\): pad the input"),
        (True, (8,), r"takes 2 spatial axes, got a shape of \(8,\)"),
    ],
)
def test_sizes_that_do_not_fit(interpolate, size, message):
    embedding = PatchEmbedding(1, (8, 12), 4, 8, spatial_dims=2, interpolate=interpolate)
    with pytest.raises(ValueError, match=message):
        embedding(torch.zeros(1, 1, *size))


def test_as_many_tokens_in_another_arrangement_are_refused():
    """They would fit the table, with every position in the wrong place."""
    with pytest.raises(ValueError, match=r"got \(12, 8\)"):
        PatchEmbedding(1, (8, 12), 4, 8, spatial_dims=2)(torch.zeros(1, 1, 12, 8))

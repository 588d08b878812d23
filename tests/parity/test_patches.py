"""Patches, their merging and their positions against MONAI 1.6.1 (golden/3d/blocks)."""

from __future__ import annotations

import json

import pytest
import torch

from medseg3d.layers.patches import MERGING_ORDER_2D, MERGING_ORDERS, ConvPatchEmbedding, PatchEmbedding, PatchMerging
from medseg3d.layers.positions import sincos_positions
from tests.parity.golden_blocks import GoldenBlock


@pytest.fixture
def golden(request, shared):
    return GoldenBlock(shared("golden", "3d", "blocks"), request.param)


def cases(*names):
    return pytest.mark.parametrize("golden", names, indirect=True)


def test_the_orders_of_merging(shared):
    stored = json.loads(shared("golden", "3d", "blocks", "merging_orders.json").read_text())
    names = {"legacy_monai_0.9_to_1.4": "legacy", "merging_monai_1.5_on": "merging", "mergingv2": "mergingv2"}
    for theirs, ours in names.items():
        assert [list(offset) for offset in MERGING_ORDERS[ours]] == stored[theirs]
    assert [list(offset) for offset in MERGING_ORDER_2D] == stored["2d_all_modes"]


@cases("patch_merging_0", "patch_merging_1", "patch_merging_2")
@pytest.mark.parametrize("order", MERGING_ORDERS)
def test_patch_merging(golden, order):
    x = golden.arrays["x"]
    block = golden.prepare(PatchMerging(x.shape[-1], x.dim() - 2, order))
    with torch.no_grad():
        golden.check(block(x), f"y_{order}")


@cases("patch_embed_0", "patch_embed_1", "patch_embed_2")
def test_swin_patch_embedding_with_and_without_gradients(golden):
    case = golden.case
    arguments = (case["sd"], case["patch_size"], case["in_chans"], case["embed_dim"], case["norm"])
    block = golden.prepare(ConvPatchEmbedding(*arguments))
    for gradients in (False, True):  # which take different operations
        with torch.set_grad_enabled(gradients):
            golden.check(block(golden.arrays["x"]).movedim(-1, 1))


@cases("vit_embed_0", "vit_embed_1")
def test_vit_patch_embedding_with_and_without_gradients(golden):
    case = golden.case
    arguments = (case["in_channels"], case["img_size"], case["patch_size"], case["hidden_size"], case["proj_type"])
    block = golden.prepare(PatchEmbedding(*arguments))
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            golden.check(block(golden.arrays["x"]))


@cases("sincos_0", "sincos_1")
def test_sincos_positions(golden):
    golden.check(sincos_positions(golden.case["grid"], golden.case["hidden"]), "pos")

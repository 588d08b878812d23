"""Self-attention and the transformer block against MONAI 1.6.1 (golden/3d/blocks)."""

from __future__ import annotations

import pytest
import torch

from medseg3d.layers.transformer import SelfAttention, TransformerBlock
from tests.parity.golden_blocks import GoldenBlock


@pytest.fixture(params=["self_attention_0", "self_attention_1"])
def golden(request, shared):
    return GoldenBlock(shared("golden", "3d", "blocks"), request.param)


@pytest.mark.parametrize("gradients", [False, True])  # which take different operations
def test_self_attention(golden, gradients):
    case = golden.case
    block = golden.prepare(SelfAttention(case["hidden_size"], case["num_heads"], 0.0, case["qkv_bias"]), "sa_keys")
    with torch.set_grad_enabled(gradients):
        golden.check(block(golden.arrays["x"]), "y_sa")


@pytest.mark.parametrize("gradients", [False, True])
def test_transformer_block(golden, gradients):
    case = golden.case
    arguments = (case["hidden_size"], 2 * case["hidden_size"], case["num_heads"], 0.0, case["qkv_bias"])
    block = golden.prepare(TransformerBlock(*arguments), "block_keys")
    with torch.set_grad_enabled(gradients):
        golden.check(block(golden.arrays["x"]), "y_block")

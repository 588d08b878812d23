"""The transformer block: start, dropout, recomputation. The numbers themselves are held by tests/parity."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from medseg3d.layers.transformer import (
    FEW_TOKENS,
    MLP,
    SelfAttention,
    TransformerBlock,
    TransformerBlocks,
    recompute_in_backward,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def gradients(module, tokens):
    module.zero_grad()
    module(tokens).square().sum().backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def test_weights_start_from_a_truncated_normal_and_biases_from_zero():
    for layer in (m for m in TransformerBlock(64, 128, 4, qkv_bias=True).modules() if isinstance(m, nn.Linear)):
        assert 0.018 < layer.weight.std() < 0.022
        assert not layer.bias.any()


def test_the_norm_that_takes_no_part_is_not_trained():
    block = TransformerBlock(12, 24, 3)
    without = {name for name, p in block.named_parameters() if not p.requires_grad}
    assert without == {"norm_cross_attn.weight", "norm_cross_attn.bias"}
    assert gradients(block, torch.randn(1, 5, 12)).keys() == {name for name, _ in block.named_parameters()} - without


@pytest.mark.parametrize("tokens", [5, FEW_TOKENS + 1])
@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_way_of_computing_attention_agrees(tokens, record, dtype):
    attention = SelfAttention(12, 3, qkv_bias=True)
    nn.init.normal_(attention.qkv.weight)
    x = torch.randn(2, tokens, 12).to(dtype)
    q, k, v = attention.qkv(x.float()).view(2, tokens, 3, 3, 4).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-1, -2) / 2).softmax(-1)
    expected = attention.out_proj((weights @ v).transpose(1, 2).flatten(2))
    with torch.set_grad_enabled(record):
        y = attention.to(dtype)(x)
    assert y.dtype == dtype
    share = 1e-5 if dtype == torch.float32 else 0.03
    assert (y.float() - expected).norm() < share * expected.norm()


def test_heads_must_share_the_width():
    with pytest.raises(ValueError, match="hidden_size must be a multiple of num_heads, got 12 and 5"):
        SelfAttention(12, 5)


@pytest.mark.parametrize("tokens", [5, FEW_TOKENS + 1])
def test_dropout_of_attention_weights_in_training_only(tokens):
    attention = SelfAttention(12, 3, dropout=0.25)
    # All weights are 1 / tokens and only the first token has values: an output is zero where that weight was dropped.
    nn.init.zeros_(attention.qkv.weight)
    nn.init.ones_(attention.qkv.weight[24:])
    mixed = []
    attention.out_proj.register_forward_pre_hook(lambda _, inputs: mixed.append(inputs[0] * tokens))
    x = torch.zeros(40, tokens, 12)
    x[:, 0, 0] = 1
    with torch.no_grad():
        attention.eval()(x)
        attention.train()(x)
    in_evaluation, in_training = mixed
    torch.testing.assert_close(in_evaluation, torch.ones_like(x))
    dropped = in_training == 0
    assert 0.2 < dropped.float().mean() < 0.3
    torch.testing.assert_close(in_training[~dropped], torch.full_like(in_training[~dropped], 4 / 3))


def test_mlp_drops_inside_and_behind():
    mlp = MLP(8, 512, dropout=0.5)
    nn.init.ones_(mlp.linear1.weight)
    nn.init.ones_(mlp.linear2.weight)
    x = torch.full((200, 8), 3.0)
    full = mlp.eval()(x)[0, 0]
    y = mlp.train()(x)
    behind = (y == 0).float().mean()
    assert 0.4 < behind < 0.6
    kept = y[y != 0] / full / 2  # twice for the dropout behind, and around one for the one inside
    assert kept.std() > 0.01 and abs(kept.mean() - 1) < 0.05


def test_blocks_give_what_each_of_them_gave():
    blocks = TransformerBlocks(3, 12, 24, 3)
    tokens = torch.randn(2, 5, 12)
    with torch.no_grad():
        states = blocks(tokens)
        assert len(states) == 3
        for block, state in zip(blocks, states, strict=True):
            tokens = block(tokens)
            assert torch.equal(state, tokens)
    assert all(key.split(".")[0] in {"0", "1", "2"} for key in blocks.state_dict())


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.linear(x).tanh()


def test_recomputation_happens_in_training_only_and_changes_nothing():
    plain, recomputing = Counting(), recompute_in_backward(Counting())
    recomputing.load_state_dict(plain.state_dict())
    x = torch.randn(3, 4)
    expected = gradients(plain, x)
    torch.testing.assert_close(gradients(recomputing, x), expected, rtol=0, atol=0)
    assert recomputing.calls == 2
    recomputing.eval()
    gradients(recomputing, x)
    assert recomputing.calls == 3
    with torch.no_grad():
        recomputing.train()(x)
    assert recomputing.calls == 4


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_recomputes_with_its_own_weights(duplicate):
    original = recompute_in_backward(Counting())
    copied = duplicate(original)
    with torch.no_grad():
        copied.linear.weight.zero_()
        copied.linear.bias.zero_()
    x = torch.randn(3, 4)
    assert not copied(x).any() and original(x).any()
    gradients(copied, x)
    assert copied.linear.weight.grad is not None and original.linear.weight.grad is None

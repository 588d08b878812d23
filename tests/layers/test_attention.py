"""Attention with a bias: its value, and its gradients, which are computed in parts."""

from __future__ import annotations

import pytest
import torch

from medseg3d.layers import attention as module
from medseg3d.layers.attention import attention


def explicit(q, k, v, bias):
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return (scores if bias is None else scores + bias).softmax(-1) @ v


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(7, 3, 5, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    return q, k, v, torch.randn(3, 5, 5, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("biased", [True, False])
def test_the_value_is_that_of_the_equation(tensors, biased):
    q, k, v, bias = tensors
    bias = bias if biased else None
    torch.testing.assert_close(attention(q, k, v, bias), explicit(q, k, v, bias))


def test_gradients_reach_everything_and_do_not_depend_on_the_parts(tensors, monkeypatch):
    monkeypatch.setattr(module, "SCORES_AT_A_TIME", 2 * 3 * 5 * 5)  # two windows of the seven
    tensors = [x.requires_grad_() for x in tensors]
    cotangent = torch.randn(7, 3, 5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = torch.autograd.grad((attention(*tensors) * cotangent).sum(), tensors)
    expected = torch.autograd.grad((explicit(*tensors) * cotangent).sum(), tensors)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_a_bias_of_its_own_for_each_window(tensors):
    q, k, v, bias = tensors
    bias = torch.stack([bias * i for i in range(len(q))]).requires_grad_()
    got = torch.autograd.grad(attention(q, k, v, bias).square().sum(), bias)[0]
    expected = torch.autograd.grad(explicit(q, k, v, bias).square().sum(), bias)[0]
    torch.testing.assert_close(got, expected)


def test_dropout_drops_weights(tensors):
    q, k, v, bias = tensors
    torch.manual_seed(0)
    assert not torch.allclose(attention(q, k, v, bias, dropout=0.5), attention(q, k, v, bias))

"""Scaled dot-product attention with an additive bias that may be learned.

Vaswani et al., "Attention is all you need", 2017, equation 1; the bias inside the softmax is that of Liu et al., "Swin
transformer", ICCV 2021, equation 4.

Shape legend: q_BHND, k_BHND, v_BHND are (batch, heads, tokens, width of a head).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from medseg3d.layers.derived import OwnGradient, is_plain_eager, once_differentiable, wants_plain

SCORES_AT_A_TIME = 2**21  # of the backward pass, so that they stay in the cache


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None = None, dropout: float = 0.0
) -> torch.Tensor:
    """softmax(q kᵀ / sqrt(D) + bias) v, of shape (B, H, N, D).

    Args:
        q: queries (B, H, N, D), of any strides.
        k: keys, likewise.
        v: values, likewise.
        bias: added to the scores, (H, N, N) or what broadcasts to (B, H, N, N).
        dropout: probability with which a weight is dropped.
    """
    if bias is not None and bias.dtype != q.dtype:
        bias = bias.to(q.dtype)
    if bias is not None and bias.dim() == 3:
        # PyTorch's fused kernel for the CPU gives no gradient of the bias; its other way keeps all scores at once.
        learns = bias.requires_grad and torch.is_grad_enabled()
        if learns and q.device.type == "cpu" and dropout == 0 and is_plain_eager():
            return _AttentionWithLearnedBias.apply(q, k, v, bias)
        bias = bias.expand(q.shape[0], -1, -1, -1)
    if wants_plain():
        return formed_attention(q, k, v, bias, dropout)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    # The kernel's strides are not those of the operations that an exporter puts in its place.
    return mixed.clone(memory_format=torch.contiguous_format) if torch.compiler.is_exporting() else mixed


def formed_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None = None, dropout: float = 0.0
) -> torch.Tensor:
    """The same with all scores in memory, of operations that have every derivative."""
    scores_BHNN = torch.matmul(q, k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    scores_BHNN = scores_BHNN if bias is None else scores_BHNN + bias
    return torch.matmul(F.dropout(scores_BHNN.softmax(-1), dropout, dropout > 0), v)


class _AttentionWithLearnedBias(OwnGradient):
    """Attention whose backward pass computes the scores again, a few windows at a time."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias_HNN: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(q, k, v, bias_HNN)
        bias = bias_HNN.detach().expand(len(q), -1, -1, -1)  # with a gradient the fused kernel would not be taken
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v, bias_HNN = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
        grad_bias = torch.zeros(bias_HNN.shape, dtype=torch.float32)
        at_a_time = max(1, SCORES_AT_A_TIME // bias_HNN.numel())
        for start in range(0, len(q), at_a_time):
            part = slice(start, start + at_a_time)
            keys, values, out_grad = k[part], v[part], grad[part]
            queries = q[part] * scale
            weights = torch.matmul(queries, keys.transpose(-1, -2)).add_(bias_HNN).softmax(-1)
            grad_v[part] = weights.transpose(-1, -2) @ out_grad
            grad_weights = out_grad @ values.transpose(-1, -2)
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            grad_bias += grad_scores.sum(0, dtype=torch.float32)
            grad_q[part] = (grad_scores @ keys).mul_(scale)
            grad_k[part] = grad_scores.transpose(-1, -2) @ queries
        return grad_q, grad_k, grad_v, grad_bias.to(bias_HNN.dtype)

"""The transformer encoder's parts: perceptron, self-attention and the block of both.

Vaswani et al., "Attention is all you need", NeurIPS 2017, with the norms in front of each part as in Dosovitskiy et
al., "An image is worth 16x16 words", ICLR 2021, section 3.1. The state_dict keys are those of MONAI 1.6.

Shape legend: ``tokens_BNE`` is (batch, tokens, embedding width).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from medseg3d.layers.attention import formed_attention
from medseg3d.layers.derived import is_plain_eager, wants_plain

INITIAL_STD = 0.02  # of the truncated normal that ViT and Swin start from
FEW_TOKENS = 512


def linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    """A linear layer as transformers start it: truncated normal weights, no bias."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    nn.init.trunc_normal_(layer.weight, std=INITIAL_STD)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class MLP(nn.Module):
    """Two linear layers with a GELU between them, each followed by dropout; (..., hidden_size) keeps its shape."""

    def __init__(self, hidden_size: int, mlp_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear1 = linear(hidden_size, mlp_dim)
        self.linear2 = linear(mlp_dim, hidden_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.dropout(F.gelu(self.linear1(x)))
        return self.dropout(self.linear2(x))


def _attend(q_BHND: torch.Tensor, k_BHND: torch.Tensor, v_BHND: torch.Tensor, dropout: float) -> torch.Tensor:
    """Attention with dropout of its weights, (B, H, N, D).

    On CPUs, for few tokens, scores are better formed than streamed in bfloat16 and with gradients. With gradients it
    also rounds as references do, and rounding decides on which side of a kink of the activations behind a voxel falls.
    """
    if not torch.jit.is_scripting():
        few = q_BHND.device.type == "cpu" and is_plain_eager() and q_BHND.shape[2] <= FEW_TOKENS
        if wants_plain() or (few and (torch.is_grad_enabled() or q_BHND.dtype == torch.bfloat16)):
            return formed_attention(q_BHND, k_BHND, v_BHND, None, dropout)
    return F.scaled_dot_product_attention(q_BHND, k_BHND, v_BHND, dropout_p=dropout)


class SelfAttention(nn.Module):
    """Every token attends to every token with ``num_heads`` heads; (B, N, hidden_size) keeps its shape."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float = 0.0, qkv_bias: bool = False) -> None:
        super().__init__()
        if num_heads < 1 or hidden_size % num_heads:
            raise ValueError(f"hidden_size must be a multiple of num_heads, got {hidden_size} and {num_heads}")
        self.num_heads = num_heads
        self.out_proj = linear(hidden_size, hidden_size)
        self.qkv = linear(hidden_size, 3 * hidden_size, bias=qkv_bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens_BNE: torch.Tensor) -> torch.Tensor:
        batch, length, width = tokens_BNE.shape
        qkv = self.qkv(tokens_BNE).view(batch, length, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = _attend(q, k, v, self.dropout.p if self.training else 0.0)
        return self.dropout(self.out_proj(mixed.transpose(1, 2).reshape(batch, length, width)))


class TransformerBlock(nn.Module):
    """Attention and perceptron, each behind a norm and beside a shortcut; (B, N, hidden_size) keeps its shape.

    ``norm_cross_attn`` takes no part: MONAI 1.6 stores one in every block, so files of weights have it.
    """

    def __init__(
        self, hidden_size: int, mlp_dim: int, num_heads: int, dropout: float = 0.0, qkv_bias: bool = False
    ) -> None:
        super().__init__()
        self.mlp = MLP(hidden_size, mlp_dim, dropout)
        self.norm1 = nn.LayerNorm(hidden_size)
        self.attn = SelfAttention(hidden_size, num_heads, dropout, qkv_bias)
        self.norm2 = nn.LayerNorm(hidden_size)
        self.norm_cross_attn = nn.LayerNorm(hidden_size).requires_grad_(False)

    def forward(self, tokens_BNE: torch.Tensor) -> torch.Tensor:
        tokens_BNE = tokens_BNE + self.attn(self.norm1(tokens_BNE))
        return tokens_BNE + self.mlp(self.norm2(tokens_BNE))


class TransformerBlocks(nn.ModuleList):
    """``num_layers`` blocks, one behind the other: ``tokens_BNE`` -> a list of what each of them gave.

    With ``recompute``, training keeps only what goes into each block and computes the rest again for the gradient.
    """

    def __init__(
        self,
        num_layers: int,
        hidden_size: int,
        mlp_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        qkv_bias: bool = False,
        recompute: bool = False,
    ) -> None:
        arguments = (hidden_size, mlp_dim, num_heads, dropout, qkv_bias)
        super().__init__(TransformerBlock(*arguments) for _ in range(num_layers))
        if recompute:
            for block in self:
                recompute_in_backward(block)

    def forward(self, tokens_BNE: torch.Tensor) -> list[torch.Tensor]:
        states: list[torch.Tensor] = []
        for block in self:
            tokens_BNE = block(tokens_BNE)
            states.append(tokens_BNE)
        return states


def recompute_in_backward(module: nn.Module) -> nn.Module:
    """Let the module, in training, keep its inputs only and compute everything else again for the gradient.

    Chen et al., "Training deep nets with sublinear memory cost", 2016. The second pass leaves the running statistics of
    batch norms alone: they have seen that batch. TorchScript cannot script such a module.
    """
    # Not a closure: a copy of the module must recompute with the copy's weights.
    module.forward = partial(_recomputed, type(module).forward, module)  # type: ignore[method-assign]
    return module


def _recomputed(forward: Callable[..., Any], module: nn.Module, *inputs: torch.Tensor) -> Any:
    if not module.training or not torch.is_grad_enabled():
        return forward(module, *inputs)
    if torch.compiler.is_compiling():
        return checkpoint(forward, module, *inputs, use_reentrant=False)
    return checkpoint(partial(_counted_once, forward, module), *inputs, use_reentrant=False)


def _counted_once(forward: Callable[..., Any], module: nn.Module, *inputs: torch.Tensor) -> Any:
    if torch._C._current_graph_task_id() == -1:  # the first pass; the second one is within a backward pass
        return forward(module, *inputs)
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(norm, norm.momentum, b, b.clone()) for norm in norms if (b := norm.num_batches_tracked) is not None]
    for norm, *_ in before:
        norm.momentum = 0.0
    try:
        return forward(module, *inputs)
    finally:  # checkpoint leaves the second pass by an exception as soon as it has what it needs
        for norm, momentum, batches, count in before:
            norm.momentum = momentum
            batches.copy_(count)

"""Shifted windows of tokens and the relative positions inside one: Liu et al., "Swin transformer", ICCV 2021, section
3.2.

A grid of tokens, padded with zeros at its end to whole windows and rolled back by the shift, is cut into windows. In
the last window along an axis the roll brings tokens of both ends together; they must not see each other. So there are
only two kinds of windows along an axis, 2^n in all, and as many masks, whatever the grid. Windows come out sorted by
kind.

The padding takes part in attention (its queries and keys are the bias of their linear map), as in the published
weights.

Shape legend: ``x_B...E`` is (batch, *grid of tokens, width), windows_WNE is (windows of all images, tokens in one,
width).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from medseg3d.layers.derived import OwnGradient, is_plain_eager, once_differentiable

Size = tuple[int, ...]
MASKED = -100.0  # added to a score, as in the published code: small enough for a weight of zero, not too small for fp16


@dataclass(frozen=True)
class Windows:
    """How a batch of token grids is cut: where each row of the windows comes from, and back.

    Attributes:
        index: (W * N,) the token, of all images in a row, that each row of the windows takes.
        padding: (W * N, 1) bool, the rows of the windows that take no token and are zero; None if there are none.
        inverse: (B * tokens,) the row of the windows that each token went to.
        kinds: for each kind of window, in order: how many there are, and the mask (N, N) to be added to their scores.
        tokens: N, tokens in a window.
    """

    index: torch.Tensor
    padding: torch.Tensor | None
    inverse: torch.Tensor
    kinds: tuple[tuple[int, torch.Tensor | None], ...]
    tokens: int

    def partition(self, x: torch.Tensor) -> torch.Tensor:
        """``x_B...E`` -> windows_WNE."""
        rows = x.reshape(-1, x.shape[-1])
        return _take(rows, self.index, self.padding, self.inverse, None).view(-1, self.tokens, x.shape[-1])

    def reverse(self, windows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """windows_WNE -> tokens in the shape of ``like_B...E``."""
        rows = windows.reshape(-1, windows.shape[-1])
        return _take(rows, self.inverse, None, self.index, self.padding).view(*like.shape[:-1], windows.shape[-1])


def fitting_window(grid: Size, window: Size, shift: Size) -> tuple[Size, Size]:
    """The window and its shift along each axis: an axis no longer than the window is one window and is not shifted."""
    size = tuple(min(n, w) for n, w in zip(grid, window, strict=True))
    moved = tuple(0 if n <= w else s for n, w, s in zip(grid, window, shift, strict=True))
    return size, moved


def cut_into_windows(batch: int, grid: Size, window: Size, shift: Size, device: torch.device) -> Windows:
    """The windows of ``batch`` grids; ``window`` and ``shift`` as ``fitting_window`` gives them."""
    if not is_plain_eager():  # what a tracer makes belongs to its graph
        return _cut(batch, grid, window, shift, device)
    return _cut_and_keep(batch, grid, window, shift, device)


@functools.lru_cache(maxsize=64)
def _cut_and_keep(batch: int, grid: Size, window: Size, shift: Size, device: torch.device) -> Windows:
    with torch.inference_mode(False):  # they may be used in training later
        return _cut(batch, grid, window, shift, device)


def _cut(batch: int, grid: Size, window: Size, shift: Size, device: torch.device) -> Windows:
    counts = tuple(-(-n // w) for n, w in zip(grid, window, strict=True))
    # Along an axis: the windows that the roll leaves whole and the last one, which it makes of two ends.
    segments = [((0, k - 1), (k - 1, k)) if s else ((0, k),) for k, s in zip(counts, shift, strict=True)]
    joined = [(False, True) if s else (False,) for s in shift]
    index, padding, kinds = [], [], []
    for ranges, ends in zip(itertools.product(*segments), itertools.product(*joined), strict=True):
        count = prod([stop - start for start, stop in ranges])
        if count:
            taken, outside = _sources(grid, window, shift, ranges, device)
            offset = prod(grid) * torch.arange(batch, device=device)[:, None]
            index.append((taken + offset).flatten())
            padding.append(outside.expand(batch, -1).flatten())
            kinds.append((batch * count, _mask(window, shift, ends, device)))
    rows, outside = torch.cat(index), torch.cat(padding)
    # Rows of padding point behind the last token, and that place is cut off again.
    tokens = batch * prod(grid)
    inverse = torch.empty(tokens + 1, dtype=torch.long, device=device)
    inverse[torch.where(outside, tokens, rows)] = torch.arange(rows.shape[0], device=device)
    whole = tuple(k * w for k, w in zip(counts, window, strict=True))
    return Windows(
        torch.where(outside, 0, rows),
        None if whole == grid else outside[:, None],
        inverse[:-1],
        tuple(kinds),
        prod(window),
    )


def _sources(
    grid: Size, window: Size, shift: Size, ranges: Sequence[tuple[int, int]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """For the windows in ``ranges`` of one grid: the token of each row, flat, and whether the row is padding."""
    axes = len(grid)
    token = torch.zeros((1,) * (2 * axes), dtype=torch.long, device=device)
    outside = torch.zeros((1,) * (2 * axes), dtype=torch.bool, device=device)
    for axis, (n, w, s, (start, stop)) in enumerate(zip(grid, window, shift, ranges, strict=True)):
        padded = -(-n // w) * w
        position = (torch.arange(start * w, stop * w, device=device) + s) % padded
        shape = [1] * (2 * axes)
        shape[axis], shape[axes + axis] = stop - start, w
        position = position.view(shape)
        token = token * n + position
        outside = outside | (position >= n)
    return token.flatten(), outside.flatten()


def _mask(window: Size, shift: Size, ends: Sequence[bool], device: torch.device) -> torch.Tensor | None:
    """(N, N): 0 between tokens of one region and ``MASKED`` between two; None where all are of one."""
    if not any(ends):
        return None
    region = torch.zeros((1,) * len(window), dtype=torch.long, device=device)
    for axis, (w, s, joined) in enumerate(zip(window, shift, ends, strict=True)):
        shape = [1] * len(window)
        shape[axis] = w
        rolled_over = (torch.arange(w, device=device) >= w - s) if joined else torch.zeros(w, device=device)
        region = 2 * region + rolled_over.long().view(shape)
    region = region.flatten()
    return MASKED * (region[:, None] != region[None, :]).float()


def relative_position_index(window: Size) -> torch.Tensor:
    """(N, N) int64: the row of the bias table for each pair of tokens; the table runs over all offsets in C order."""
    positions = torch.stack(torch.meshgrid(*(torch.arange(w) for w in window), indexing="ij")).flatten(1)
    offsets = positions[:, :, None] - positions[:, None, :]
    index = torch.zeros(offsets.shape[1:], dtype=torch.long)
    for offset, w in zip(offsets, window, strict=True):
        index = index * (2 * w - 1) + offset + w - 1
    return index


def _take(
    rows: torch.Tensor,
    index: torch.Tensor,
    empty: torch.Tensor | None,
    inverse: torch.Tensor,
    inverse_empty: torch.Tensor | None,
) -> torch.Tensor:
    """``rows[index]``, with zeros at ``empty``; ``inverse`` and ``inverse_empty`` lead the other way."""
    if rows.requires_grad and torch.is_grad_enabled() and is_plain_eager():
        return _Take.apply(rows, index, empty, inverse, inverse_empty)
    return _taken(rows, index, empty)


def _taken(rows: torch.Tensor, index: torch.Tensor, empty: torch.Tensor | None) -> torch.Tensor:
    taken = rows.index_select(0, index)
    return taken if empty is None else taken.masked_fill_(empty, 0)


class _Take(OwnGradient):
    """Each token goes to one place, so its gradient is taken from there; PyTorch would add up row by row."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, index: torch.Tensor, empty: Any, inverse: Any, inverse_empty: Any) -> Any:
        ctx.inverse, ctx.inverse_empty = inverse, inverse_empty
        return _taken(rows, index, empty)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        return _taken(grad, ctx.inverse, ctx.inverse_empty), None, None, None, None

"""Position tables of vision transformers: the vector that is added to each token of a grid.

Shape legend: ``table_1NE`` is (1, tokens, embedding width), the tokens of a grid in C order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn import functional as F

INTERPOLATION = {2: "bilinear", 3: "trilinear"}


def sincos_positions(grid: Sequence[int], width: int, temperature: float = 10000.0) -> torch.Tensor:
    """Sines and cosines of the grid indices: Vaswani et al., "Attention is all you need", NeurIPS 2017, section 3.5.

    Each axis has an equal share of the channels, half of it sines. The second axis comes first, then the first, then
    the third: so it is in MONAI, whose weights must find their places.

    Args:
        grid: tokens along each of two or three axes.
        width: embedding width, a multiple of twice the number of axes.
        temperature: ratio of the shortest to the (never quite reached) longest wavelength.

    Returns:
        The table (1, N, width), float32.

    Raises:
        ValueError: the width cannot be shared out.
    """
    axes = len(grid)
    if axes not in INTERPOLATION:
        raise ValueError(f"a grid of positions has two or three axes, got {tuple(grid)}")
    if width % (2 * axes):
        raise ValueError(f"sin-cos positions in {axes}D need a width that is a multiple of {2 * axes}, got {width}")
    frequencies = width // (2 * axes)
    omega = 1 / temperature ** (torch.arange(frequencies, dtype=torch.float32) / frequencies)
    indices = torch.meshgrid(*(torch.arange(size, dtype=torch.float32) for size in grid), indexing="ij")
    parts = []
    for axis in (1, 0, 2)[:axes]:
        angles_NF = indices[axis].flatten()[:, None] * omega
        parts += [angles_NF.sin(), angles_NF.cos()]
    return torch.cat(parts, dim=1)[None]


def interpolate_positions(table_1NE: torch.Tensor, old_grid: Sequence[int], new_grid: Sequence[int]) -> torch.Tensor:
    """The table of one grid for another that covers the same field, linear between the centres of the tokens.

    Dosovitskiy et al., ICLR 2021, section 3.2. The table itself where the grids are the same.

    Args:
        table_1NE: positions of ``old_grid``; gradients flow to it.
        old_grid: tokens along each of two or three axes.
        new_grid: the same for the table that is wanted.

    Returns:
        The table (1, prod(new_grid), E) in the dtype of the old one.

    Raises:
        ValueError: the table is not one of ``old_grid``, or the grids have different numbers of axes.
    """
    old_grid, new_grid = tuple(old_grid), tuple(new_grid)
    if len(old_grid) not in INTERPOLATION or len(new_grid) != len(old_grid):
        raise ValueError(f"grids of positions have two or three axes, the same number each: got {old_grid}, {new_grid}")
    if table_1NE.dim() != 3 or table_1NE.shape[:2] != (1, math.prod(old_grid)):
        shape = tuple(table_1NE.shape)
        raise ValueError(f"positions of the grid {old_grid} have shape (1, {math.prod(old_grid)}, width), got {shape}")
    if old_grid == new_grid:
        return table_1NE
    table_1E = table_1NE.float().unflatten(1, old_grid).movedim(-1, 1)
    mode = INTERPOLATION[len(old_grid)]
    table_1E = F.interpolate(table_1E, size=new_grid, mode=mode, align_corners=False)
    return table_1E.movedim(1, -1).flatten(1, -2).to(table_1NE.dtype)

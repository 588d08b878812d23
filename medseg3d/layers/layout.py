"""Channels-last images: the channels of a voxel lie together, as transformers leave them and convolutions want them;
and the metadata that images carry.

Shape legend: ``x_BC...`` is (batch, channels, *spatial axes), two or three spatial axes.
"""

from __future__ import annotations

from typing import Any

import torch

MEMORY_FORMAT = {4: torch.channels_last, 5: torch.channels_last_3d}  # by the number of axes


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """``x_BC...`` in channels-last memory format; no copy where it is already."""
    return x.contiguous(memory_format=MEMORY_FORMAT[x.dim()])


def is_channels_last(x: torch.Tensor) -> bool:
    return x.is_contiguous(memory_format=MEMORY_FORMAT[x.dim()])


def rows(x: torch.Tensor) -> torch.Tensor:
    """``x_BC...`` as (voxels, channels), in the same memory where it is channels-last."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def with_metadata_of(x: Any, y: torch.Tensor) -> torch.Tensor:
    """``y`` with the metadata of ``x``, if that is a MetaTensor of MONAI: kernels of our own lose it."""
    return type(x)(y).copy_meta_from(x) if hasattr(x, "copy_meta_from") else y

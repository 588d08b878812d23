"""Convolutions, norms and activations for 2D and 3D, named once.

Shape legend: ``x_BC...`` is (batch, channels, *spatial axes), two or three spatial axes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from medseg3d.layers.normalization import GroupNorm, InstanceNorm
from medseg3d.layers.winograd import Conv3d

CONV: dict[int, type[nn.Conv2d] | type[nn.Conv3d]] = {2: nn.Conv2d, 3: Conv3d}
TRANSPOSED_CONV = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
MAX_POOL = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
DROPOUT = {2: nn.Dropout2d, 3: nn.Dropout3d}
BATCH_NORM = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
ACTIVATIONS = {
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "leakyrelu": nn.LeakyReLU,
    "prelu": nn.PReLU,
    "relu": nn.ReLU,
}

NameAndArguments = str | tuple[str, Mapping[str, Any]] | list[Any]


def check_spatial_dims(spatial_dims: int) -> int:
    """Return ``spatial_dims``; ValueError unless it is 2 or 3."""
    if spatial_dims not in CONV:
        raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims!r}")
    return spatial_dims


def per_axis(value: int | Sequence[int], spatial_dims: int, name: str) -> tuple[int, ...]:
    """One number for every spatial axis: an int is repeated, a sequence must have the right length."""
    values = (value,) * spatial_dims if isinstance(value, int) else tuple(value)
    if len(values) != spatial_dims:
        raise ValueError(f"{name} needs one number for each of {spatial_dims} axes, got {value!r}")
    return values


def _name_and_arguments(spec: NameAndArguments) -> tuple[str, Mapping[str, Any]]:
    if isinstance(spec, str):
        return spec.lower(), {}
    name, arguments = spec
    return str(name).lower(), arguments


def norm_layer(spec: NameAndArguments | None, channels: int, spatial_dims: int) -> nn.Module:
    """``None``, ``"batch"``, ``"instance"`` or ``"group"`` (of 8 groups), or a pair (name, keyword arguments)."""
    if spec is None:
        return nn.Identity()
    name, arguments = _name_and_arguments(spec)
    if name == "batch":
        return BATCH_NORM[spatial_dims](channels, **arguments)
    if name == "instance":
        return InstanceNorm(channels, **arguments)
    if name == "group":
        return GroupNorm(**{"num_groups": 8, **arguments}, num_channels=channels)
    raise ValueError(f"norm must be None, 'batch', 'instance' or 'group', got {spec!r}")


def activation_layer(spec: NameAndArguments, channels: int | None = None) -> nn.Module:
    """One of ``ACTIVATIONS`` by name, or a pair (name, keyword arguments).

    Plain ``"prelu"`` learns one slope for each of ``channels``, or a single one where they are not given.
    """
    if spec == "prelu" and channels is not None:
        return nn.PReLU(channels)
    name, arguments = _name_and_arguments(spec)
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {spec!r}")
    return ACTIVATIONS[name](**arguments)


def is_convolution(
    layer: nn.Module, kind: type[nn.Module], size: int, stride: int = 1, padding: int = 0, bias: bool = True
) -> bool:
    """Whether the layer is exactly of this ``kind`` of ``CONV`` or ``TRANSPOSED_CONV`` and of this kernel.

    Then its weight and its bias, which ``bias`` allows, say all. Otherwise it must be called: it was replaced.
    """
    if type(layer) is not kind or "forward" in vars(layer):
        return False
    own: Any = layer
    axes = len(own.kernel_size)
    geometry = own.kernel_size, own.stride, own.padding, own.dilation
    wanted = tuple((number,) * axes for number in (size, stride, padding, 1))
    return geometry == wanted and own.groups == 1 and own.padding_mode == "zeros" and (bias or own.bias is None)


def centre_crop(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The middle of ``x_BC...`` in the size of ``like_BC...``; where the difference is odd the end loses one more."""
    for axis in range(2, x.dim()):
        extra = x.shape[axis] - like.shape[axis]
        if extra != 0:
            x = x.narrow(axis, extra // 2, like.shape[axis])
    return x

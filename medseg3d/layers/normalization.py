"""Instance normalisation and the leaky ReLU after it, in one place and, where possible, in the memory of their input;
and the gradient of group normalisation.

Ulyanov et al., "Instance normalization: the missing ingredient for fast stylization", 2016, equation 4: every channel
of every image is brought to mean 0 and variance 1 over its voxels. Nothing is remembered from training.

PyTorch's kernel knows no channels-last layout and copies the tensor twice; its channels-last batch norm has the right
arithmetic for one image, but sums up 10^6 voxels in sequence, which costs four digits in float32. Here the statistics
are collected in pieces and merged in float64, and batch norm's kernels do the rest.

Shape legend: ``x_BC...`` is (batch, channels, *spatial axes), two or three spatial axes; voxels are (voxels, channels).
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import nn
from torch.nn import functional as F

from medseg3d.layers.derived import OwnGradient, is_eager, is_hooked, is_plain_eager, once_differentiable
from medseg3d.layers.layout import channels_last, is_channels_last, rows

PIECE = 8192  # voxels summed up at a time


class InstanceNorm(nn.Module):
    """Instance normalisation; the state_dict keys are those of ``nn.InstanceNorm3d`` without running statistics.

    Args:
        channels: channels of the input.
        eps: added to the variance.
        affine: whether to learn a scale and a shift a channel.

    Raises:
        ValueError: in ``forward``, for an input of a single voxel, whose variance says nothing.
    """

    def __init__(self, channels: int, eps: float = 1e-5, affine: bool = False) -> None:
        super().__init__()
        self.channels = channels
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.instance_norm(x, weight=self.weight, bias=self.bias, eps=self.eps)
        if not torch.jit.is_scripting():
            _take_contiguous_gradients(y)
        return y

    def extra_repr(self) -> str:
        return f"{self.channels}, eps={self.eps}, affine={self.weight is not None}"


class GroupNorm(nn.GroupNorm):
    """``nn.GroupNorm`` (Wu & He, ECCV 2018) whose gradient is ten times faster for channels-last tensors on CPUs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102 -- TorchScript would compile one long condition
            if self.affine and torch.is_grad_enabled() and x.requires_grad and x.dim() in (4, 5) and _has_kernels(x):
                return _GroupNormalize.apply(x, self.weight, self.bias, self.num_groups, self.eps)
        return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class LocalResponseNorm(nn.LocalResponseNorm):
    """``nn.LocalResponseNorm`` in float32: PyTorch has no kernel of half precision on CPUs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.float()).to(x.dtype)


@torch.jit.unused
def _take_contiguous_gradients(y: torch.Tensor) -> None:
    """PyTorch 2.13 on CPUs: for one image a channels-last gradient of instance norm comes back wrong."""
    if y.requires_grad and is_eager():
        y.register_hook(lambda gradient: gradient.contiguous())


def normalize_and_activate(
    x: torch.Tensor,
    norm: nn.Module,
    slope: float | None = None,
    residual: torch.Tensor | None = None,
    block: nn.Module | None = None,
) -> torch.Tensor:
    """``leaky_relu(norm(x) + residual)``; without ``slope`` no activation.

    ``x_BC...`` must be of no further use to the caller and of none to the gradient of what made it, as is the output of
    a convolution: it may be overwritten, unless a hook looks at the norm or another part of its ``block``.
    """
    if _is_known(norm) and _has_kernels(x) and not is_hooked(block or norm):
        if not torch.is_grad_enabled():
            return _normalize_(x, norm, slope, residual)
        if isinstance(norm, InstanceNorm) and norm.weight is None and x.requires_grad:
            return _NormalizeAndActivate.apply(x, residual, slope, norm.eps)
    x = norm(x)
    if residual is not None:
        x = x + residual
    return x if slope is None else F.leaky_relu(x, slope, inplace=residual is not None)


def slope_of(act: nn.Module) -> float | None:
    """The slope below 0 of a ReLU or a leaky one, for `normalize_and_activate`; None for other activations."""
    if type(act) is nn.LeakyReLU:  # a subclass may compute something else
        return act.negative_slope
    return 0.0 if type(act) is nn.ReLU else None


def _is_known(norm: nn.Module) -> TypeGuard[InstanceNorm | nn.GroupNorm]:
    """Whether the norm computes what its numbers say; a subclass may compute something else."""
    return type(norm) in (InstanceNorm, GroupNorm, nn.GroupNorm) and "forward" not in vars(norm)


def _has_kernels(x: torch.Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and is_plain_eager()
        and is_channels_last(x)
        and x.numel() > x.shape[0] * x.shape[1]
    )


def _statistics(voxels: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance of each channel's group, float32 (C,), merged from the statistics of pieces."""
    pieces = voxels.split(PIECE)
    means, variances = zip(*(torch.batch_norm_update_stats(piece, None, None, 0.0) for piece in pieces), strict=True)
    mean_PC, variance_PC = torch.stack(means).double(), torch.stack(variances).double()
    share_P1 = torch.tensor([[len(piece) / len(voxels)] for piece in pieces], dtype=torch.float64)
    mean = (share_P1 * mean_PC).sum(0)
    square = (share_P1 * (variance_PC + (mean_PC - mean).square())).sum(0) + mean.square()
    size = len(mean) // groups
    mean, square = (x.view(groups, size).mean(1).repeat_interleave(size) for x in (mean, square))
    return mean.float(), (square - mean.square()).float()


def _normalize_(
    x: torch.Tensor, norm: InstanceNorm | nn.GroupNorm, slope: float | None, residual: torch.Tensor | None
) -> torch.Tensor:
    with torch.no_grad():
        groups = norm.num_groups if isinstance(norm, nn.GroupNorm) else x.shape[1]
        _standardize_(x, groups, norm.eps, norm.weight, norm.bias)
        if residual is not None:
            x += residual
        return x if slope is None else F.leaky_relu_(x, slope)


def _standardize_(
    x: torch.Tensor,
    groups: int,
    eps: float,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Normalise ``x_BC...`` where it lies; 1 / standard deviation of each image and channel, float32 (B, C)."""
    channels = x.shape[1]
    inverse_deviation = torch.empty(len(x), channels)
    for image, inverse in zip(x.split(1), inverse_deviation, strict=True):
        voxels = rows(image)
        mean, variance = _statistics(voxels, groups)
        torch.rsqrt(variance + eps, out=inverse)
        scale = inverse if weight is None else inverse * weight
        _scale_and_shift_(voxels, scale, -mean * scale if bias is None else bias - mean * scale)
    return inverse_deviation


def _scale_and_shift_(voxels: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor | None = None) -> None:
    """``voxels * scale + shift`` in place, with float32 numbers a channel on voxels of any precision."""
    _scale_and_shift(voxels, scale.float(), torch.zeros(len(scale)) if shift is None else shift.float(), voxels)


def _scale_and_shift(
    voxels: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, target: torch.Tensor | None = None
) -> torch.Tensor:
    target = torch.empty_like(voxels) if target is None else target
    zero, one = torch.zeros(len(scale)), torch.ones(len(scale))
    unused = torch.empty(0), torch.empty(0)
    torch.native_batch_norm(voxels, scale, shift, zero, one, False, 0.0, 0.0, out=(target, *unused))
    return target


class _NormalizeAndActivate(OwnGradient):
    """leaky_relu(instance_norm(x) + residual) that keeps nothing but its output, which the next convolution keeps too.

    The activation is undone from the output, after Rota Bulo et al., "In-place activated batchnorm", CVPR 2018.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, residual: torch.Tensor | None, slope: float | None, eps: float
    ) -> torch.Tensor:
        inverse_deviation = _standardize_(x, x.shape[1], eps)
        if residual is not None:
            x += residual
        if slope is not None:
            F.leaky_relu_(x, slope)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x, residual, inverse_deviation)
        ctx.slope = slope
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None, None]:
        y, residual, inverse_deviation = ctx.saved_tensors
        grad = channels_last(grad)
        if ctx.slope is None:
            normalized = y.clone(memory_format=torch.preserve_format)
        else:
            grad = torch.ops.aten.leaky_relu_backward(grad, y, ctx.slope, True)
            normalized = F.leaky_relu(y, 1 / ctx.slope)
        if residual is not None:
            normalized -= residual
        for image, image_grad, inverse in zip(normalized.split(1), grad.split(1), inverse_deviation, strict=True):
            _gradient_(rows(image), rows(image_grad), inverse)
        return normalized, None if residual is None else grad.to(residual.dtype), None, None


class _GroupNormalize(OwnGradient):
    """Group norm whose gradient is put together from the kernels of batch norm."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float
    ) -> torch.Tensor:
        batch, channels = x.shape[:2]
        y, mean_BG, inverse_BG = torch.native_group_norm(x, weight, bias, batch, channels, x[0, 0].numel(), groups, eps)
        ctx.save_for_backward(x, weight, mean_BG, inverse_BG)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None]:
        """x' = inverse * (w * g - mean(w * g) - normalized * mean(w * g * normalized)), means over a group's voxels."""
        x, weight, mean_BG, inverse_BG = ctx.saved_tensors
        grad, result = channels_last(grad), torch.empty_like(x)
        channels, groups = x.shape[1], mean_BG.shape[1]
        size = channels // groups
        weight_grad, bias_grad = torch.zeros(2, channels, dtype=torch.float64)
        for n, (image, image_grad, image_result) in enumerate(
            zip(x.split(1), grad.split(1), result.split(1), strict=True)
        ):
            voxels = rows(image)
            mean, inverse = (one[n].float().repeat_interleave(size) for one in (mean_BG, inverse_BG))
            with_normalized, alone = _moments(voxels, rows(image_grad), mean, inverse)
            weight_grad += with_normalized
            bias_grad += alone
            of_group = torch.stack([with_normalized, alone]) * weight / (len(voxels) * size)
            slope, level = of_group.view(2, groups, size).sum(2).repeat_interleave(size, dim=1).float()
            target = rows(image_result)
            _scale_and_shift(voxels, -slope * inverse.square(), (slope * inverse * mean - level) * inverse, target)
            target += _scale_and_shift(rows(image_grad), inverse * weight, torch.zeros_like(mean))
        return result, weight_grad.to(weight.dtype), bias_grad.to(weight.dtype), None, None


def _moments(
    voxels: torch.Tensor, grad: torch.Tensor, mean: torch.Tensor, inverse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of grad * (voxels - mean) * inverse and of grad over all voxels, float64 (C,)."""
    sums = torch.zeros(2, len(mean), dtype=torch.float64)
    zero = torch.zeros_like(mean)
    for piece, piece_grad in zip(voxels.split(PIECE), grad.split(PIECE), strict=True):
        moments = torch.ops.aten.native_batch_norm_backward(
            piece_grad, piece, None, mean, inverse.reciprocal().square(), zero, zero, False, 0.0, [False, True, True]
        )
        sums += torch.stack(moments[1:])
    return sums[0], sums[1]


def _gradient_(normalized: torch.Tensor, grad: torch.Tensor, inverse: torch.Tensor) -> None:
    """Put inverse * (grad - mean(grad) - normalized * mean(grad * normalized)) in the place of ``normalized``."""
    channels = grad.shape[1]
    zero, one = torch.zeros(channels), torch.ones(channels)
    sums = torch.zeros(2, channels, dtype=torch.float64)
    for piece, piece_grad in zip(normalized.split(PIECE), grad.split(PIECE), strict=True):
        moments = torch.ops.aten.native_batch_norm_backward(
            piece_grad, piece, None, zero, one, zero, one, False, 0.0, [False, True, True]
        )
        sums += torch.stack(moments[1:])
    with_normalized, alone = (sums / len(grad)).float()
    _scale_and_shift_(normalized, with_normalized, alone)
    torch.sub(grad, normalized, out=normalized)
    _scale_and_shift_(normalized, inverse)

"""The last layer of a network taken off it, where that layer is a convolution of kernel 1.

Such a head is linear a voxel, so it may come after windows are blended: fewer channels are blended then.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from medseg3d.inference.slabs import Head

ENOUGH = 64  # voxels of a window along each axis, to see what a head does


def split_head(network: Callable, window: torch.Tensor) -> tuple[nn.Module, Head] | None:
    """The network without its head, and the head; None if it has none that takes fewer channels than it gives.

    Nothing is changed: the network without its head is another, with the same parameters. Both are tried on ``window``
    (1, C, *spatial), or its middle, best one with much in it, and on noise; unless the head makes what the network
    gives, nothing is taken off it.
    """
    if not isinstance(network, nn.Module) or isinstance(network, torch.jit.ScriptModule) or network.training:
        return None
    if hasattr(network, "_orig_mod"):  # compiled: it would have to be compiled again
        return None
    name, layer = _last_pointwise(network)
    if layer is None or layer.in_channels >= layer.out_channels:
        return None
    head = Head(layer.weight.detach().flatten(1), None if layer.bias is None else layer.bias.detach())
    for probe in (_middle(window), window):
        try:
            body = _without(network, name, layer)
            agrees = all(_agree(head, body(part), network(part)) for part in (probe, _noise_like(probe)))
        except Exception:  # it cannot be copied, counts on its number of classes, or takes windows of one size only
            continue
        return (body, head) if agrees else None
    return None


def _middle(window: torch.Tensor) -> torch.Tensor:
    """The middle of a window, where that is enough and costs less."""
    for axis in range(2, window.dim()):
        size = min(window.shape[axis], ENOUGH)
        window = window.narrow(axis, (window.shape[axis] - size) // 2, size)
    return window


def _without(network: nn.Module, name: str, layer: nn.Conv2d | nn.Conv3d) -> nn.Module:
    kept = [*network.parameters(), *network.buffers()]
    body = copy.deepcopy(network, {id(tensor): tensor for tensor in kept})
    parent, _, own_name = name.rpartition(".")
    setattr(body.get_submodule(parent), own_name, _Passes(layer))
    return body


def _last_pointwise(network: nn.Module) -> tuple[str, nn.Conv2d | nn.Conv3d | None]:
    """The last convolution, if it is of kernel 1 with more channels than it takes."""
    last: tuple[str, nn.Conv2d | nn.Conv3d | None] = ("", None)
    for name, module in network.named_modules():
        if name and isinstance(module, nn.Conv2d | nn.Conv3d) and module.in_channels < module.out_channels:
            ones = (1,) * len(module.kernel_size)
            if module.groups == 1 and module.kernel_size == module.stride == ones and not any(module.padding):
                last = name, module
    return last


class _Passes(nn.Identity):
    """Stands for a convolution and returns its input; whoever reads its weight instead of calling it gets the same."""

    def __init__(self, layer: nn.Conv2d | nn.Conv3d) -> None:
        super().__init__()
        identity = torch.eye(layer.in_channels, dtype=layer.weight.dtype, device=layer.weight.device)
        self.weight = nn.Parameter(identity.view(*identity.shape, *layer.kernel_size), requires_grad=False)
        self.bias = None


def _noise_like(window: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(window.shape, generator=generator)
    return (noise * window.float().std().clamp_min(1.0).cpu()).to(window.device, window.dtype)


def _agree(head: Head, features: object, logits: object) -> bool:
    if not (isinstance(features, torch.Tensor) and isinstance(logits, torch.Tensor)):
        return False
    if features.shape[2:] != logits.shape[2:] or features.shape[1] != head.weight.shape[1]:
        return False
    if logits.shape[1] != len(head.weight):
        return False
    made = torch.stack([head(image.flatten(1)).view(logits.shape[1:]) for image in features])
    limit = 1e-4 if logits.dtype == torch.float32 else 2e-2
    return bool((made - logits.float()).norm() <= limit * logits.float().norm())

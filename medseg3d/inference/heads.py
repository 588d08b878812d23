"""The last layer of a network taken off it, where that layer is a convolution of kernel 1.

Such a head is linear a voxel, so it may come after windows are blended: fewer channels are blended then.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from medseg3d.inference.slabs import Head


def split_head(network: Callable, window: torch.Tensor, logits: torch.Tensor) -> tuple[nn.Module, Head] | None:
    """The network without its head, and the head; None if it has none that takes fewer channels than it gives.

    Nothing is changed: the network without its head is another, with the same parameters. It is tried on ``window``
    (B, C, *spatial), of which ``logits`` (B, K, *spatial) are the whole network's, and given up unless the head makes
    the same of what it returns.
    """
    if not isinstance(network, nn.Module) or isinstance(network, torch.jit.ScriptModule) or network.training:
        return None
    if hasattr(network, "_orig_mod"):  # compiled: it would have to be compiled again
        return None
    name, layer = _last_pointwise(network, logits.shape[1])
    if layer is None or layer.in_channels >= layer.out_channels:
        return None
    kept = [*network.parameters(), *network.buffers()]
    body = copy.deepcopy(network, {id(tensor): tensor for tensor in kept})
    parent, _, own_name = name.rpartition(".")
    setattr(body.get_submodule(parent), own_name, _identity_like(layer))
    head = Head(layer.weight.detach().flatten(1), None if layer.bias is None else layer.bias.detach())
    try:
        features = body(window)
    except RuntimeError:  # the network counts on its number of classes
        return None
    return (body, head) if _agree(head, features, logits) else None


def _last_pointwise(network: nn.Module, classes: int) -> tuple[str, nn.Conv2d | nn.Conv3d | None]:
    found: tuple[str, nn.Conv2d | nn.Conv3d | None] = ("", None)
    for name, module in network.named_modules():
        if name and isinstance(module, nn.Conv2d | nn.Conv3d) and module.out_channels == classes:
            ones = (1,) * len(module.kernel_size)
            plain = module.groups == 1 and module.kernel_size == module.stride == ones and not any(module.padding)
            found = (name, module) if plain else ("", None)
    return found


def _identity_like(layer: nn.Conv2d | nn.Conv3d) -> nn.Module:
    """A convolution that returns its input: whoever reads its weight instead of calling it gets the same."""
    identity = type(layer)(layer.in_channels, layer.in_channels, 1, bias=False)
    identity.weight = nn.Parameter(torch.eye(layer.in_channels).view_as(identity.weight), requires_grad=False)
    return identity.to(layer.weight.device, layer.weight.dtype).eval()


def _agree(head: Head, features: object, logits: torch.Tensor) -> bool:
    if not isinstance(features, torch.Tensor) or features.shape[2:] != logits.shape[2:]:
        return False
    if features.shape[1] != head.weight.shape[1]:
        return False
    made = torch.stack([head(image.flatten(1)).view(logits.shape[1:]) for image in features])
    limit = 1e-4 if logits.dtype == torch.float32 else 2e-2
    return bool((made - logits.float()).norm() <= limit * logits.float().norm())

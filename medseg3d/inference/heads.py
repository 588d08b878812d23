"""The last layer of a network taken off it, where that layer is a convolution of kernel 1.

Such a head is linear a voxel, so it may come after windows are blended: fewer channels are blended then. A network that
is made of others takes their heads off itself, by a method ``without_head(window)`` that returns what
:func:`split_head` does, and puts them together with :func:`joined`.

Shape legend: K classes, F channels before a head, V voxels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeGuard

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from medseg3d.inference.averaging import Mean
from medseg3d.inference.slabs import Head, Slab

ENOUGH = (32, 64)  # voxels of a window along each axis, to see what a head does; deep networks do not take the first


@dataclass(frozen=True)
class MeanHead(Head):
    """Several heads, each with channels of its own, whose mean probability is wanted: its logarithm is the logits.

    It is not linear: after blending it gives the mean probability of blended logits.

    Attributes:
        heads: linear ones of the same K classes; ``weight`` has theirs side by side.
        shares: of each head in the mean.
    """

    heads: Sequence[Head] = ()
    shares: Sequence[float] = ()
    linear: ClassVar[bool] = False

    def __call__(self, features_FV: torch.Tensor) -> torch.Tensor:
        mean = Mean("probabilities")
        parts = features_FV.split([head.weight.shape[1] for head in self.heads])
        for head, share, part_FV in zip(self.heads, self.shares, parts, strict=True):
            mean.add(head(part_FV)[None], share)
        return mean.result()[0]


def joined(heads: Sequence[Head], shares: Sequence[float], average: str) -> Head | None:
    """One head for the channels of several side by side, which gives the mean of what they give.

    Args:
        heads: of networks that are averaged.
        shares: of each in the mean.
        average: "logits" or "probabilities", see :class:`medseg3d.inference.averaging.Mean`.

    Returns:
        None if that takes as many channels as there are classes or more, or has no such form.
    """
    classes = {len(head.weight) for head in heads}
    if len(classes) > 1 or not all(head.linear for head in heads):
        return None
    if sum(head.weight.shape[1] for head in heads) >= max(classes):
        return None
    if average == "probabilities":
        return MeanHead(torch.cat([head.weight.float() for head in heads], 1), None, heads, shares)
    total = sum(shares)
    parts = [(share / total, head) for share, head in zip(shares, heads, strict=True)]
    biases = [share * head.bias.float() for share, head in parts if head.bias is not None]
    weight_KF = torch.cat([share * head.weight.float() for share, head in parts], 1)
    return Head(weight_KF, torch.stack(biases).sum(0) if biases else None)


def split_head(network: Callable, window: torch.Tensor) -> tuple[Callable, Head] | None:
    """The network without its head, and the head; None if it has none that takes fewer channels than it gives.

    Nothing is changed: the network without its head is another, with the same parameters. Both are tried on ``window``
    (1, C, *spatial), or its middle, best one with much in it, and on noise; unless the head makes what the network
    gives, nothing is taken off it. Nor is it where a hook is set on a part of the network: it would see the features.
    """
    if isinstance(network, nn.Module) and _is_hooked(network):
        return None
    if hasattr(network, "without_head"):
        return network.without_head(window)
    if not isinstance(network, nn.Module) or isinstance(network, torch.jit.ScriptModule) or network.training:
        return None
    if hasattr(network, "_orig_mod"):  # compiled: it would have to be compiled again
        return None
    if not any(_widens(module) for name, module in network.named_modules() if name):
        return None
    for probe in (*(_middle(window, size) for size in ENOUGH), window):
        try:
            logits = network(probe)
            found = last_pointwise(network, logits.shape[1]) if isinstance(logits, torch.Tensor) else None
            if found is None:  # most networks of few classes: they are neither copied nor run again
                return None
            name, layer = found
            head = Head(layer.weight.detach().flatten(1), None if layer.bias is None else layer.bias.detach())
            body, noise = _without(network, name, layer), _noise_like(probe)
            agrees = _agree(head, body(probe), logits) and _agree(head, body(noise), network(noise))
        except Exception:  # it cannot be copied, counts on its number of classes, or takes windows of one size only
            continue
        return (body, head) if agrees else None
    return None


def last_pointwise(network: nn.Module, classes: int) -> tuple[str, nn.Conv2d | nn.Conv3d] | None:
    """Name and layer of the last convolution of kernel 1 from fewer channels than classes to as many; None if none is.

    The last in the order in which layers were made: whether it runs last is for the caller to see.
    """
    found = None
    for name, module in network.named_modules():
        if _widens(module) and module.out_channels == classes:
            found = name, module
    return found


def _widens(module: nn.Module) -> TypeGuard[nn.Conv2d | nn.Conv3d]:
    """Whether this is a convolution of kernel 1 that gives more channels than it takes."""
    if not isinstance(module, nn.Conv2d | nn.Conv3d) or module.in_channels >= module.out_channels:
        return False
    ones = (1,) * len(module.kernel_size)
    return module.groups == 1 and module.kernel_size == module.stride == ones and not any(module.padding)


def _is_hooked(network: nn.Module) -> bool:
    return _has_any_global_hook() or any(part._forward_hooks or part._forward_pre_hooks for part in network.modules())


def _middle(window: torch.Tensor, size: int) -> torch.Tensor:
    """The middle of a window, of ``size`` voxels along each axis at most."""
    for axis in range(2, window.dim()):
        length = min(window.shape[axis], size)
        window = window.narrow(axis, (window.shape[axis] - length) // 2, length)
    return window


def _without(network: nn.Module, name: str, layer: nn.Conv2d | nn.Conv3d) -> nn.Module:
    kept = [*network.parameters(), *network.buffers()]
    body = copy.deepcopy(network, {id(tensor): tensor for tensor in kept})
    parent, _, own_name = name.rpartition(".")
    setattr(body.get_submodule(parent), own_name, _Passes(layer))
    return body


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
    off = size = torch.zeros((), dtype=torch.float64, device=logits.device)
    for image_F, logits_K in zip(features, logits, strict=True):
        logits_KV = logits_K.flatten(1)
        for part, made_KV in Slab(0, 0, image_F, head).blocks():  # all of them would take the classes' memory again
            wanted_KV = logits_KV[:, part].float()
            off = off + (made_KV - wanted_KV).square().sum()
            size = size + wanted_KV.square().sum()
    limit = 1e-4 if logits.dtype == torch.float32 else 2e-2
    return bool(off.sqrt() <= limit * size.sqrt())

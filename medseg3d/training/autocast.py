"""Mixed precision for training, without a fault of PyTorch's that would spoil weights unseen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def thin_maps_in_float32(network: nn.Module) -> Iterator[None]:
    """Around a training step: what ``torch.autocast`` would give wrong gradients on a CPU runs in float32.

    PyTorch (2.13 at least) computes wrong gradients, finite or not, for the bfloat16 weights of a 3D convolution whose
    input has fewer slices along its first axis than the kernel, as at the deepest level of a network in small windows.
    It goes around forward and backward pass both, since gradient checkpointing runs a part of the network once more.
    """
    left: list[bool] = []  # one entry for each convolution that runs: whether it left autocast

    def leave(conv: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        image = inputs[0]
        thin = image.device.type == "cpu" and image.shape[2] < conv.kernel_size[0]
        left.append(thin and torch.is_autocast_enabled("cpu"))
        if not left[-1]:
            return inputs
        torch.set_autocast_enabled("cpu", False)
        return (image.float(),)

    def come_back(conv: Any, inputs: Any, output: Any) -> None:
        if left.pop():
            torch.set_autocast_enabled("cpu", True)

    with ExitStack() as stack:
        for module in network.modules():
            if isinstance(module, nn.Conv3d):
                stack.callback(module.register_forward_pre_hook(leave).remove)
                stack.callback(module.register_forward_hook(come_back, always_call=True).remove)
        yield

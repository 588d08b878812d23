"""What one training step does, for ``monai.engines.SupervisedTrainer(iteration_update=...)``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by the number of axes


def channels_last(network: nn.Module) -> nn.Module:
    """The same network with its convolution weights in channels-last order, which CPU and GPU kernels prefer."""
    for parameter in network.parameters():
        if parameter.dim() in _CHANNELS_LAST:
            parameter.data = parameter.data.contiguous(memory_format=_CHANNELS_LAST[parameter.dim()])
    return network


class SegmentationIteration:
    """One step of training of a semantic network.

    Each batch is a dictionary with ``image`` (B, C, ...), ``label`` (B, 1, ...) and what the loss takes besides, such
    as ``annotated`` for cases in which some organs were not contoured, or ``weights`` of voxels. The network runs under
    autocast to ``dtype``. A loss or gradient that is not finite raises before the weights change, so that a diverged
    run stops with its last checkpoint intact. (On CPUs with AVX512 bfloat16, PyTorch 2.13 gives the weights of a 3D
    convolution on a map of 2 x 2 x 2 such gradients: choose windows that leave more voxels at the deepest level.)

    Args:
        beside: keys of the batch that the engine's loss gets after logits and labels.
        dtype: precision of the forward pass; bfloat16 needs no loss scaling.
        clip_norm: the gradient's L2 norm is clipped to this.
    """

    def __init__(self, *beside: str, dtype: torch.dtype = torch.bfloat16, clip_norm: float = 12.0) -> None:
        self.beside = beside
        self.dtype = dtype
        self.clip_norm = clip_norm

    def __call__(self, engine: Any, batch: dict[str, Any]) -> dict[str, Any]:
        device = torch.device(engine.state.device)
        image = _plain(batch["image"], device)
        label = _plain(batch["label"], device)
        beside = [_plain(batch[key], device) for key in self.beside]
        engine.network.train()
        engine.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits = engine.inferer(image, engine.network)
        loss = engine.loss_function(logits, label, *beside)
        _step(engine, loss, self.clip_norm)
        return {"image": image, "label": label, "pred": logits.detach(), "loss": loss.detach()}


class DetectionIteration:
    """One step of training of a network that returns its losses by name if it gets targets.

    Each batch is a list of dictionaries with ``image`` (C, H, W), 0 to 1, and the targets: ``collate_fn`` of the data
    loader is ``list``. The losses are summed. What is not finite raises, as in ``SegmentationIteration``.

    Args:
        targets: keys of what the network is to learn.
        dtype: precision of the forward pass.
        clip_norm: the gradient's L2 norm is clipped to this.
    """

    def __init__(
        self,
        targets: Sequence[str] = ("boxes", "labels", "masks"),
        dtype: torch.dtype = torch.bfloat16,
        clip_norm: float = 12.0,
    ) -> None:
        self.targets = tuple(targets)
        self.dtype = dtype
        self.clip_norm = clip_norm

    def __call__(self, engine: Any, batch: Sequence[dict[str, Any]]) -> dict[str, Any]:
        device = torch.device(engine.state.device)
        images = [_plain(item["image"], device) for item in batch]
        targets = [{key: _plain(item[key], device) for key in self.targets} for item in batch]
        engine.network.train()
        engine.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
            losses = engine.network(images, targets)
        loss = torch.stack(list(losses.values())).sum()
        _step(engine, loss, self.clip_norm)
        return {"loss": loss.detach(), **{name: value.detach() for name, value in losses.items()}}


def _step(engine: Any, loss: torch.Tensor, clip_norm: float) -> None:
    """Gradients and new weights; weights stay as they are if anything is not finite."""
    if not torch.isfinite(loss):
        raise RuntimeError(
            f"the loss became {loss.item()} at iteration {engine.state.iteration}; lower the learning rate"
        )
    loss.backward()
    norm = nn.utils.clip_grad_norm_(engine.network.parameters(), clip_norm)
    if not torch.isfinite(norm):
        raise RuntimeError(
            f"the gradient's norm became {norm.item()} at iteration {engine.state.iteration}; lower the learning "
            "rate, or set dtype to torch.float32"
        )
    engine.optimizer.step()


def _plain(value: Any, device: torch.device) -> torch.Tensor:
    """A tensor without MONAI's metadata, which would slow every operation of the step."""
    value = value.as_tensor() if hasattr(value, "as_tensor") else value
    value = value.to(device)
    memory_format = _CHANNELS_LAST.get(value.dim(), torch.contiguous_format)
    return value.contiguous(memory_format=memory_format)

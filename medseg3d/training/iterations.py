"""What one training step does, for ``monai.engines.SupervisedTrainer(iteration_update=...)``."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from medseg3d.training.autocast import thin_maps_in_float32

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by the number of axes


class Diverged(RuntimeError):
    """A loss or a gradient is not finite; the weights are what they were.

    Attributes:
        event: what happened, when, and in which cases, without advice.
    """

    def __init__(self, message: str, event: str = "") -> None:
        super().__init__(message)
        self.event = event or message


def channels_last(network: nn.Module) -> nn.Module:
    """The same network with its convolution weights in channels-last order, which CPU and GPU kernels prefer."""
    for parameter in network.parameters():
        if parameter.dim() in _CHANNELS_LAST:
            parameter.data = parameter.data.contiguous(memory_format=_CHANNELS_LAST[parameter.dim()])
    return network


class SegmentationIteration:
    """One step of training of a semantic network.

    Each batch is a dictionary with ``image`` (B, C, ...), ``label`` (B, 1, ...) and what the loss takes besides, such
    as ``annotated`` for cases in which some organs were not contoured, or ``weights`` of voxels; ``case`` may name its
    cases. The network runs under autocast to ``dtype``. A loss or gradient that is not finite raises :class:`Diverged`
    before the weights change, in all processes if there are several.

    Args:
        beside: keys of the batch that the engine's loss gets after logits and labels.
        dtype: precision of the forward pass; bfloat16 needs no loss scaling.
        clip_norm: the gradient's L2 norm is clipped to this.
        micro_batches: the batch goes through the network in so many parts, one after another, and their gradients are
            averaged: the memory of one part. A loss over the batch, such as Dice, becomes the mean of the parts'.
    """

    def __init__(
        self, *beside: str, dtype: torch.dtype = torch.bfloat16, clip_norm: float = 12.0, micro_batches: int = 1
    ) -> None:
        if micro_batches < 1:
            raise ValueError(f"micro_batches must be 1 or more, got {micro_batches}")
        self.beside = beside
        self.dtype = dtype
        self.clip_norm = clip_norm
        self.micro_batches = micro_batches

    def __call__(self, engine: Any, batch: dict[str, Any]) -> dict[str, Any]:
        device = torch.device(engine.state.device)
        whole = [_plain(batch[key], device) for key in ("image", "label", *self.beside)]
        parts = list(zip(*(value.tensor_split(min(self.micro_batches, len(whole[0]))) for value in whole), strict=True))
        engine.network.train()
        engine.optimizer.zero_grad(set_to_none=True)
        with thin_maps_in_float32(engine.network):
            results = [self._backward(engine, part, len(whole[0]), part is parts[-1]) for part in parts]
        loss = torch.stack([loss for loss, _ in results]).sum()
        _take(engine, loss, self.clip_norm, batch.get("case", ()))
        return {"image": whole[0], "label": whole[1], "pred": torch.cat([one for _, one in results]), "loss": loss}

    def _backward(
        self, engine: Any, part: tuple[torch.Tensor, ...], total: int, last: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The part's share of the loss, and its logits; gradients are added to those of the parts before."""
        image, label, *beside = part
        with contextlib.nullcontext() if last else _no_exchange(engine.network):
            with torch.autocast(image.device.type, self.dtype, enabled=self.dtype != torch.float32):
                logits = engine.inferer(image, engine.network)
            loss = engine.loss_function(logits, label, *beside) * (len(image) / total)
            loss.backward()
        return loss.detach(), logits.detach()


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
        _step(engine, loss, self.clip_norm, [item["case"] for item in batch if "case" in item])
        return {"loss": loss.detach(), **{name: value.detach() for name, value in losses.items()}}


def _no_exchange(network: nn.Module) -> contextlib.AbstractContextManager:
    """Several processes exchange their gradients once a step, after its last part."""
    return network.no_sync() if isinstance(network, DistributedDataParallel) else contextlib.nullcontext()


def _step(engine: Any, loss: torch.Tensor, clip_norm: float, cases: Sequence[str] = ()) -> None:
    """The gradients of the loss, and a step along them."""
    loss.backward()
    _take(engine, loss.detach(), clip_norm, cases)


def _take(engine: Any, loss: torch.Tensor, clip_norm: float, cases: Sequence[str]) -> None:
    """New weights from the gradients; they stay as they are if anything is not finite, here or in another process."""
    norm = nn.utils.clip_grad_norm_(engine.network.parameters(), clip_norm)
    finite = torch.stack([loss, norm]).isfinite().all().int()  # looked at once: a GPU is waited for here
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(finite, dist.ReduceOp.MIN)
    if finite:
        engine.optimizer.step()
        return
    engine.optimizer.zero_grad(set_to_none=True)
    if not torch.isfinite(loss):
        what, advice = f"the loss became {loss.item()}", "lower the learning rate"
    elif not torch.isfinite(norm):
        what = f"the gradient's norm became {norm.item()}"
        advice = "lower the learning rate, or set dtype to torch.float32"
    else:
        what, advice = "the loss of another process is not finite", "see its message"
    event = f"{what} at iteration {engine.state.iteration}" + (f" ({', '.join(cases)})" if cases else "")
    raise Diverged(f"{event}; {advice}", event)


def _plain(value: Any, device: torch.device) -> torch.Tensor:
    """A tensor without MONAI's metadata, which would slow every operation of the step."""
    value = value.as_tensor() if hasattr(value, "as_tensor") else value
    value = value.to(device)
    memory_format = _CHANNELS_LAST.get(value.dim(), torch.contiguous_format)
    return value.contiguous(memory_format=memory_format)

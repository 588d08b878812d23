"""Self-supervised training of ``medseg3d.networks.SSLHead``: what one step does and how it is judged.

For ``monai.engines.SupervisedTrainer(iteration_update=...)`` and ``SupervisedEvaluator`` of the same argument. A batch
has ``image`` (B, C, ...), two sub-volumes or more; labels are neither needed nor looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from medseg3d.data.views import cut_out, turn_at_random
from medseg3d.training.autocast import thin_maps_in_float32
from medseg3d.training.iterations import _plain, _step


class PretrainingIteration:
    """One step: two views of each sub-volume, each turned and cut on its own, through the network at once.

    What is not finite raises, as in ``SegmentationIteration``.

    Args:
        share: share of the voxels that noise covers, and again the share that another sub-volume covers.
        dtype: precision of the forward pass.
        clip_norm: the gradient's L2 norm is clipped to this.
    """

    def __init__(self, share: float = 0.3, dtype: torch.dtype = torch.bfloat16, clip_norm: float = 12.0) -> None:
        self.share = share
        self.dtype = dtype
        self.clip_norm = clip_norm

    def __call__(self, engine: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        image = _plain(batch["image"], torch.device(engine.state.device))
        engine.network.train()
        engine.optimizer.zero_grad(set_to_none=True)
        with thin_maps_in_float32(engine.network):
            losses = _losses(engine.network, engine.loss_function, image, self.share, self.dtype)
            loss = torch.stack(list(losses.values())).sum()
            _step(engine, loss, self.clip_norm)
        return _detached(loss, losses)


class PretrainingValidation:
    """The same losses without a step, of views that are the same in every epoch.

    Args:
        loss: the trainer's ``PretrainingLoss``.
        share: as in training.
        dtype: precision of the forward pass.
        seed: of the views.
    """

    def __init__(self, loss: Callable, share: float = 0.3, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> None:
        self.loss = loss
        self.share = share
        self.dtype = dtype
        self.seed = seed

    @torch.no_grad()
    def __call__(self, engine: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        image = _plain(batch["image"], torch.device(engine.state.device))
        engine.network.eval()
        generator = torch.Generator().manual_seed(self.seed + engine.state.iteration)
        losses = _losses(engine.network, self.loss, image, self.share, self.dtype, generator)
        return _detached(torch.stack(list(losses.values())).sum(), losses)


def _losses(
    network: nn.Module,
    loss: Callable,
    image: torch.Tensor,
    share: float,
    dtype: torch.dtype,
    generator: torch.Generator | None = None,
) -> dict[str, torch.Tensor]:
    turned, turns = turn_at_random(torch.cat([image, image]), generator)
    first, second = turned.chunk(2)
    views = torch.cat([cut_out(first, share, generator), cut_out(second, share, generator)])
    with torch.autocast(image.device.type, dtype, enabled=dtype != torch.float32):
        output = network(_plain(views, image.device))
    return loss(output, turns, turned)


def _detached(loss: torch.Tensor, losses: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"loss": loss.detach(), **{name: value.detach() for name, value in losses.items()}}

"""How the learning rate rises and falls over a training run."""

from __future__ import annotations

import math

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class WarmupCosine(LRScheduler):
    """A linear rise, then half a cosine down to 0 (Loshchilov & Hutter, "SGDR", 2017, equation 5, one cycle).

    It reads the rate that it starts from in each group's ``initial_lr``, so that whoever lowers that lowers the rest of
    the run; and it reckons from ``total_iters``, so that a resumed run may end elsewhere.

    Args:
        optimizer: its groups' ``lr`` is the highest rate.
        total_iters: steps of the schedule until the rate is 0.
        warmup: share of them, 0 to below 1, over which the rate rises.
        last_epoch: index of the last step, as in every schedule of PyTorch.

    Raises:
        ValueError: a share or a number of steps that is not in its range.
    """

    def __init__(self, optimizer: Optimizer, total_iters: int, warmup: float = 0.05, last_epoch: int = -1) -> None:
        if not 0 <= warmup < 1:
            raise ValueError(f"warmup must be 0 or more and below 1, got {warmup}")
        if total_iters < 1:
            raise ValueError(f"total_iters must be 1 or more, got {total_iters}")
        self.total_iters = total_iters
        self.warmup = warmup
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | torch.Tensor]:
        return [group["initial_lr"] * self._share() for group in self.optimizer.param_groups]

    def _share(self) -> float:
        rising = min(round(self.warmup * self.total_iters), self.total_iters - 1)  # the highest rate has a step too
        if self.last_epoch < rising:
            return (self.last_epoch + 1) / (rising + 1)
        progress = min((self.last_epoch - rising) / (self.total_iters - rising), 1.0)
        return (1 + math.cos(math.pi * progress)) / 2

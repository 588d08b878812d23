"""Weights averaged over the steps of a training run, which segment better than those of any one step."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import nn

from medseg3d.training.checkpoint import unwrapped
from medseg3d.training.guard import GuardEvents


class AveragedWeights:
    """Handler that keeps an exponential moving average of a network's weights; validate and save ``network`` of it.

    After n steps the next one's weights get the share ``1 - min(decay, n / (n + 9))``: the average starts with the
    weights of the first step and forgets a random beginning soon, so that one decay suits short and long runs. Buffers,
    such as statistics of batch norm, are copied. Where :class:`~medseg3d.training.Guarded` goes back to earlier
    weights, the average begins anew: what led astray is in it.

    Args:
        network: what is trained, with or without ``DistributedDataParallel``; each process averages for itself, which
            gives the same everywhere.
        decay: share of the average that a step of a long run leaves, 0 (no averaging) or more and below 1.

    Raises:
        ValueError: a decay that is not in this range.
    """

    def __init__(self, network: nn.Module, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be 0 or more and below 1, got {decay}")
        self.decay = decay
        self.steps = 0
        self._trained = unwrapped(network)
        self.network = deepcopy(self._trained).eval().requires_grad_(False)

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.update)
        engine.register_events(*GuardEvents)
        engine.add_event_handler(GuardEvents.WENT_BACK, self.begin_anew)

    def begin_anew(self) -> None:
        """The next weights stand for all so far."""
        self.steps = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take up the weights as they are now."""
        kept = min(self.decay, self.steps / (self.steps + 9))
        self.steps += 1
        averaged, trained = list(self.network.parameters()), list(self._trained.parameters())
        torch._foreach_lerp_(averaged, trained, 1 - kept)
        for buffer, now in zip(self.network.buffers(), self._trained.buffers(), strict=True):
            buffer.copy_(now)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "weights": self.network.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = int(state["steps"])
        self.network.load_state_dict(state["weights"])

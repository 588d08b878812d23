"""When a training run ends before its last epoch."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from typing import Any

import ignite.distributed as idist
from ignite.engine import Engine, Events
from monai.engines import Evaluator

logger = logging.getLogger(__name__)


class StopEarly:
    """Handler that ends a run that no longer gets better, or whose time is up, always at the end of an epoch.

    However a run ends, its last weights are validated. Place it behind the ``ValidationHandler``, and put it into the
    ``save_dict`` of :class:`~medseg3d.training.ResumeFromLast`.

    Args:
        evaluator: what the ``ValidationHandler`` runs; its key metric decides, where it is not nan.
        patience: epochs without a better key metric after which the run ends; None never ends it.
        max_hours: an epoch that would end later than so many hours after the start is not begun; an earlier run that
            this one resumes does not count. None is no limit.

    Raises:
        ValueError: a limit that is not positive.
    """

    def __init__(self, evaluator: Evaluator, patience: int | None = None, max_hours: float | None = None) -> None:
        for name, value in (("patience", patience), ("max_hours", max_hours)):
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        self.evaluator = evaluator
        self.patience = patience
        self.max_hours = max_hours
        self.best: float | None = None
        self.best_epoch = 0
        self._started = self._epoch_started = time.monotonic()
        self._longest = 0.0  # epoch, in seconds

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._look)

    def _start(self, engine: Engine) -> None:
        self._started = self._epoch_started = time.monotonic()
        self._longest = 0.0
        if self._without_gain(engine.state.epoch):
            engine.terminate()

    def _look(self, engine: Engine) -> None:
        epoch = engine.state.epoch
        self._note(epoch)
        now = time.monotonic()
        self._longest, self._epoch_started = max(self._longest, now - self._epoch_started), now
        late = self.max_hours is not None and now - self._started + self._longest > self.max_hours * 3600
        late = bool(idist.all_reduce(int(late), "MAX"))  # one clock may be past the limit and another not yet
        ends = late or self._without_gain(epoch)
        if (ends or epoch == engine.state.max_epochs) and self.evaluator.state.epoch != epoch:
            self.evaluator.run(epoch)
            self._note(epoch)
            ends = late or self._without_gain(epoch)  # its validation may be the best so far
        if ends and epoch != engine.state.max_epochs:
            logger.info("the run ends after epoch %d: %s", epoch, "its time is up" if late else "no gain")
            engine.terminate()

    def _note(self, epoch: int) -> None:
        state = self.evaluator.state
        if state.epoch != epoch or state.key_metric_name not in state.metrics:
            return
        score = float(state.metrics[state.key_metric_name])
        if not math.isnan(score) and (self.best is None or self.evaluator.metric_cmp_fn(score, self.best)):
            self.best, self.best_epoch = score, epoch

    def _without_gain(self, epoch: int) -> bool:
        return self.patience is not None and self.best is not None and epoch - self.best_epoch >= self.patience

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "best_epoch": self.best_epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best, self.best_epoch = state["best"], state["best_epoch"]

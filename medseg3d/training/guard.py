"""A training step that survives one loss or gradient that is not finite."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

from ignite.engine import Engine, EventEnum

from medseg3d.training.iterations import Diverged

logger = logging.getLogger(__name__)


class GuardEvents(EventEnum):
    """Fired by :class:`Guarded` at the engine, if it is one of ignite's."""

    WENT_BACK = "went_back"  # earlier weights are in force again


class Guarded:
    """An iteration function that goes back to the last good weights, once, and goes on with a lower learning rate.

    Good are the weights with which a step has given a finite loss and gradient; a copy of every ``every`` th is kept in
    memory, with the optimizer's state. The first time that a step raises :class:`Diverged` they come back, the rate is
    multiplied by ``factor`` for the rest of the run, and the same batch is tried again. A batch that fails even so, and
    any later one, ends the run with an error that names its cases. The weights of the failed step were never used.

    The rate is lowered in ``lr`` and ``initial_lr`` of the optimizer's groups: a schedule that keeps a list of its own,
    such as LambdaLR, would raise it again. Put this object into the ``save_dict`` of
    :class:`~medseg3d.training.ResumeFromLast`, so that a resumed run remembers.

    Args:
        iteration: what one step does, such as :class:`~medseg3d.training.SegmentationIteration`.
        every: steps between two copies of the weights.
        factor: of the learning rate, above 0 and below 1.

    Raises:
        ValueError: a factor or a number of steps that is not in its range.
    """

    def __init__(self, iteration: Callable[[Any, Any], Any], every: int = 50, factor: float = 0.1) -> None:
        if every < 1 or not 0 < factor < 1:
            raise ValueError(f"every must be 1 or more and factor between 0 and 1, got {every} and {factor}")
        self.iteration = iteration
        self.every = every
        self.factor = factor
        self.failure = ""  # the first one, in words
        self._good: dict[str, Any] | None = None

    def __call__(self, engine: Any, batch: Any) -> Any:
        due = self._good is None or engine.state.iteration % self.every == 0
        before = _copy_of(engine) if due else None
        try:
            output = self.iteration(engine, batch)
        except Diverged as error:
            self._go_back(engine, error, self._good or before)
            return self._once_more(engine, batch)
        self._good = before or self._good
        return output

    def _go_back(self, engine: Any, error: Diverged, good: Any) -> None:
        if self.failure:
            raise Diverged(f"{error}. The rate had been lowered before: {self.failure}") from error
        self.failure = error.event
        rates = [group["lr"] * self.factor for group in engine.optimizer.param_groups]
        engine.network.load_state_dict(good["network"])
        engine.optimizer.load_state_dict(good["optimizer"])
        self._good = None  # the optimizer may go on in these very tensors
        for group, rate in zip(engine.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
            if "initial_lr" in group:
                group["initial_lr"] *= self.factor
        if isinstance(engine, Engine):
            engine.register_events(*GuardEvents)
            engine.fire_event(GuardEvents.WENT_BACK)
        logger.warning(
            "%s; back to the weights of iteration %d, the learning rate is multiplied by %g",
            *(error.event, good["iteration"], self.factor),
        )

    def _once_more(self, engine: Any, batch: Any) -> Any:
        try:
            return self.iteration(engine, batch)
        except Diverged as error:
            raise Diverged(
                f"{error.event}, and again with the weights of before and a lower rate: look at these cases",
                error.event,
            ) from error

    def state_dict(self) -> dict[str, Any]:
        return {"failure": self.failure}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.failure = str(state["failure"])


def _copy_of(engine: Any) -> dict[str, Any]:
    return {
        "network": {name: value.clone() for name, value in engine.network.state_dict().items()},
        "optimizer": deepcopy(engine.optimizer.state_dict()),
        "iteration": engine.state.iteration - 1,
    }

"""One line at the terminal: how far a training run is, how well it does and how long it will take."""

from __future__ import annotations

from typing import Any

import ignite.distributed as idist
from ignite.engine import Engine, Events
from monai.engines import Evaluator

from medseg3d.training.curves import batch_size, validation_score


class Progress:
    """Handler with a bar at the terminal: epochs, loss, last validation, samples per second, time left.

    Args:
        evaluator: what validates.
        every: iterations between two looks at the loss, each of which waits for a GPU.
        **options: of ``tqdm``, such as ``file``.
    """

    def __init__(self, evaluator: Evaluator, every: int = 5, **options: Any) -> None:
        self.evaluator = evaluator
        self.every = every
        self.options = options
        self._bar: Any = None
        self._samples = 0
        self._loss: float | None = None

    def attach(self, engine: Engine) -> None:
        if idist.get_rank() > 0:
            return
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._step)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._show)
        engine.add_event_handler(Events.COMPLETED | Events.EXCEPTION_RAISED, self._close)

    def _start(self, engine: Engine) -> None:
        from tqdm import tqdm

        total = (engine.state.max_epochs or 0) * (engine.state.epoch_length or 0)
        bar = "{desc} {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        options = {"desc": "training", "bar_format": bar, "dynamic_ncols": True, "disable": None, **self.options}
        self._bar = tqdm(total=total, initial=engine.state.iteration, **options)

    def _step(self, engine: Any) -> None:
        self._samples += batch_size(engine.state.batch) * idist.get_world_size()
        self._bar.update()
        if engine.state.iteration % self.every == 0 and not self._bar.disable:
            loss = float(engine.state.output["loss"])
            self._loss = loss if self._loss is None else 0.9 * self._loss + 0.1 * loss
            self._show(engine)

    def _show(self, engine: Engine) -> None:
        if self._bar.disable:
            return
        score = validation_score(self.evaluator)
        seconds = self._bar.format_dict["elapsed"]
        parts = [f"epoch {engine.state.epoch}/{engine.state.max_epochs}"]
        parts += [] if self._loss is None else [f"loss {self._loss:.3f}"]
        parts += [] if score is None else [f"{self.evaluator.state.key_metric_name} {score:.3f}"]
        parts += [f"{self._samples / seconds:.1f} samples/s"] if seconds > 0 else []
        self._bar.set_postfix_str(", ".join(parts))

    def _close(self, engine: Engine, error: BaseException | None = None) -> None:
        if self._bar is not None:
            self._bar.close()
        if error is not None:  # a handler of this event stands in for the engine's own raising
            raise error

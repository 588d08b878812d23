"""The figures of each epoch, as a table and as a picture beside the checkpoints."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.engines import Evaluator

from medseg3d.io import write_atomic
from medseg3d.report.curves import draw_curves
from medseg3d.report.records import write_csv

COLUMNS = ("epoch", "iteration", "learning_rate", "loss", "validation", "seconds", "samples_per_second")


class Curves:
    """Handler that writes ``curves.csv`` and ``curves.png`` after each epoch; a resumed run continues them.

    Loss and validation are also put among the engine's metrics. Attach this handler after the one that validates, and
    handlers that log the engine's metrics after this one.

    The loss is the mean of the epoch's steps, over all processes; ``validation`` is the evaluator's key metric where
    the epoch was validated; ``seconds`` are those of training, without validation.

    Args:
        folder: where the files go.
        evaluator: what validates.
    """

    def __init__(self, folder: str | Path, evaluator: Evaluator) -> None:
        self.folder = Path(folder)
        self.evaluator = evaluator
        self.rows: list[dict[str, float | None]] = []
        self._losses: list[torch.Tensor] = []
        self._samples = 0

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self._begin)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._add)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._end)

    def _begin(self, engine: Engine) -> None:
        if not self.rows and idist.get_rank() == 0:
            self.rows = [row for row in read_curves(self.folder / "curves.csv") if row["epoch"] < engine.state.epoch]
        self._losses, self._samples = [], 0

    def _add(self, engine: Any) -> None:
        self._losses.append(engine.state.output["loss"])
        self._samples += batch_size(engine.state.batch)

    def _end(self, engine: Any) -> None:
        loss = float(torch.stack(self._losses).float().mean()) if self._losses else float("nan")
        loss = float(idist.all_reduce(loss)) / idist.get_world_size()
        score, metric = self._score(engine.state.epoch), str(self.evaluator.state.key_metric_name)
        engine.state.metrics.pop(metric, None)  # of an earlier epoch, or of the training windows
        engine.state.metrics |= {"loss": loss, **({} if score is None else {metric: score})}
        if idist.get_rank() > 0:
            return
        seconds = engine.state.times[Events.EPOCH_COMPLETED.name]
        self.rows.append(
            {
                "epoch": engine.state.epoch,
                "iteration": engine.state.iteration,
                "learning_rate": engine.optimizer.param_groups[0]["lr"],
                "loss": loss,
                "validation": score,
                "seconds": seconds,
                "samples_per_second": self._samples * idist.get_world_size() / seconds,
            }
        )
        self._write()

    def _score(self, epoch: int) -> float | None:
        return validation_score(self.evaluator) if self.evaluator.state.epoch == epoch else None

    def _write(self) -> None:
        write_csv(self.folder / "curves.csv", self.rows, COLUMNS)
        picture = draw_curves(self.rows, str(self.evaluator.state.key_metric_name))
        write_atomic(self.folder / "curves.png", lambda file: picture.save(file, "PNG"))


def read_curves(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``curves.csv``, numbers or None; no rows where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: _number(text) for name, text in row.items()} for row in csv.DictReader(file)]


def validation_score(evaluator: Evaluator) -> float | None:
    """The key metric of the last validation, if there was any."""
    value = evaluator.state.metrics.get(evaluator.state.key_metric_name)
    return None if value is None else float(value)


def batch_size(batch: Any) -> int:
    """Samples of a batch: a dictionary with the image, or a list of samples."""
    return len(batch["image"]) if isinstance(batch, dict) else len(batch)


def _number(text: str) -> float | None:
    if not text:
        return None
    return int(text) if text.isdecimal() else float(text)

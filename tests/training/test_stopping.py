"""When a run ends: patience, time, and what is validated at its end."""

from __future__ import annotations

import pytest
import torch
from ignite.engine import Engine, Events
from monai.engines import Evaluator

from medseg3d.training import StopEarly, stopping


class Validation(Evaluator):
    """An evaluator that gives the scores that it is told, one an epoch."""

    def __init__(self, scores):
        super().__init__(torch.device("cpu"), [0], epoch_length=1)
        self.scores, self.epochs = scores, []
        self.state.key_metric_name = "dice"

    def _iteration(self, engine, batch):
        return {}

    def run(self, global_epoch=1):
        super().run(global_epoch)
        self.epochs.append(global_epoch)
        self.state.metrics["dice"] = self.scores[global_epoch - 1]


def train(scores, epochs=9, interval=1, state=None, **limits):
    validation = Validation(scores)
    trainer = Engine(lambda engine, batch: None)
    trainer.add_event_handler(Events.EPOCH_COMPLETED(every=interval), lambda: validation.run(trainer.state.epoch))
    stop = StopEarly(validation, **limits)
    if state is not None:
        stop.load_state_dict(state["stop"])
        trainer.state.epoch = state["epoch"]
        trainer.add_event_handler(Events.STARTED, lambda: setattr(trainer.state, "epoch", state["epoch"]))
    stop.attach(trainer)
    trainer.run([0], max_epochs=epochs)
    return trainer.state.epoch, validation.epochs, stop


def test_a_run_without_limits_ends_at_its_last_epoch_which_is_validated():
    assert train([0.5] * 9)[:2] == (9, list(range(1, 10)))
    assert train([0.5] * 9, interval=4)[:2] == (9, [4, 8, 9])


def test_patience_counts_from_the_best_epoch():
    assert train([0.1, 0.3, 0.2, 0.3, 0.25, 0.9, 0, 0, 0], patience=3)[:2] == (5, [1, 2, 3, 4, 5])
    epoch, validated, stop = train([0.1, 0.3, 0.2, 0.3, 0.25, 0.9, 0, 0, 0], patience=4)
    assert epoch == 9 and (stop.best, stop.best_epoch) == (0.9, 6) and validated[-1] == 9


def test_a_score_that_is_not_defined_is_none():
    nan = float("nan")
    epoch, _, stop = train([nan, nan, nan, 0.1, nan, 0.2, nan, nan, nan], patience=2)
    assert (epoch, stop.best, stop.best_epoch) == (8, 0.2, 6)


def test_what_was_not_validated_is_before_the_end():
    assert train([0.5] * 9, interval=2, patience=3)[:2] == (5, [2, 4, 5])


def test_a_gain_in_the_last_validation_keeps_the_run_going():
    assert train([0.1, 0.5, 0.2, 0.6, 0.3, 0.3, 0.3, 0.3, 0.3], interval=2, patience=3)[:2] == (7, [2, 4, 6, 7])
    scores = [0.1, 0.5, 0.2, 0.2, 0.6, 0.3, 0.3, 0.3, 0.3]  # the best is where nothing but the end would be validated
    assert train(scores, interval=2, patience=3)[:2] == (8, [2, 4, 5, 6, 8])


def test_the_time_is_up_before_an_epoch_that_would_end_too_late(monkeypatch):
    clock = iter(range(0, 100000, 600))  # each look is ten minutes after the one before
    monkeypatch.setattr(stopping.time, "monotonic", lambda: next(clock))
    epoch, validated, _ = train([0.5] * 9, interval=9, max_hours=0.7)
    assert (epoch, validated) == (4, [4])


def test_a_resumed_run_knows_the_best():
    scores = [0.1, 0.3, 0.2, 0.25, 0.2, 0.2, 0.2, 0.2, 0.2]
    epoch, _, stop = train(scores, epochs=3, patience=3)
    state = {"stop": stop.state_dict(), "epoch": epoch}
    assert train(scores, state=state, patience=3)[:2] == (5, [4, 5])
    assert train(scores, state={"stop": stop.state_dict(), "epoch": 5}, patience=3)[:2] == (5, [])


@pytest.mark.parametrize("limits", [{"patience": 0}, {"max_hours": -1.0}])
def test_what_it_refuses(limits):
    with pytest.raises(ValueError, match="must be above 0"):
        StopEarly(Validation([]), **limits)

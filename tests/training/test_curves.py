"""The table and the picture of a run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from ignite.engine import Engine, Events
from PIL import Image

from medseg3d.training.curves import Curves, read_curves
from medseg3d.training.progress import Progress


def train(folder, epochs, start=0, extra=()):
    """Losses 1, 2, 3, ... in epochs of two steps with three samples each; every second epoch is validated."""
    evaluator = SimpleNamespace(state=SimpleNamespace(epoch=0, key_metric_name="dice", metrics={}))
    trainer = Engine(lambda engine, batch: {"loss": torch.tensor(float(engine.state.iteration))})
    trainer.optimizer = SimpleNamespace(param_groups=[{"lr": 0.25}])

    @trainer.on(Events.STARTED)
    def resume():
        trainer.state.epoch, trainer.state.iteration = start, 2 * start

    @trainer.on(Events.EPOCH_COMPLETED(every=2))
    def validate():
        evaluator.state.epoch, evaluator.state.metrics["dice"] = trainer.state.epoch, torch.tensor(0.125)

    Curves(folder, evaluator).attach(trainer)
    for make in extra:
        make(evaluator).attach(trainer)
    logged = []
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: logged.append(dict(trainer.state.metrics)))
    trainer.run([{"image": torch.zeros(3, 1)}] * 2, max_epochs=epochs)
    return logged


def test_the_table(tmp_path):
    logged = train(tmp_path / "run", 2)
    assert logged == [{"loss": 1.5}, {"loss": 3.5, "dice": 0.125}]
    first, second = read_curves(tmp_path / "run" / "curves.csv")
    assert [first[key] for key in ("epoch", "iteration", "learning_rate", "loss", "validation")] == [
        *(1, 2, 0.25, 1.5, None)
    ]
    assert (second["loss"], second["validation"]) == (3.5, 0.125)
    assert second["samples_per_second"] == pytest.approx(6 / second["seconds"], rel=1e-3)


def test_a_resumed_run_continues_the_table(tmp_path):
    train(tmp_path, 3)
    train(tmp_path, 4, start=2)  # as if it had been killed within the third epoch
    rows = read_curves(tmp_path / "curves.csv")
    assert [(row["epoch"], row["loss"]) for row in rows] == [(1, 1.5), (2, 3.5), (3, 5.5), (4, 7.5)]
    assert {path.name for path in tmp_path.iterdir()} == {"curves.csv", "curves.png"}
    assert Image.open(tmp_path / "curves.png").mode == "RGB"


def test_steps_beyond_a_million_are_told_exactly(tmp_path):
    train(tmp_path, 617_284, start=617_282)
    train(tmp_path, 617_285, start=617_284)
    assert [row["iteration"] for row in read_curves(tmp_path / "curves.csv")] == [1_234_566, 1_234_568, 1_234_570]


def test_the_progress_line(tmp_path, capsys):
    train(tmp_path, 4, extra=[lambda evaluator: Progress(evaluator, every=1, mininterval=0, disable=False)])
    line = capsys.readouterr().err.split("\r")[-1]
    assert "100%" in line and "8/8" in line and "epoch 4/4" in line and "dice 0.125" in line
    assert "loss" in line and "samples/s" in line


def test_without_a_terminal_there_is_no_line(tmp_path, capsys):
    train(tmp_path, 2, extra=[Progress])
    assert capsys.readouterr().err == ""


def test_an_error_passes_the_progress_line(tmp_path):
    def fail(engine, batch):
        raise RuntimeError("no data")

    trainer = Engine(fail)
    Progress(SimpleNamespace(state=None), disable=True).attach(trainer)
    with pytest.raises(RuntimeError, match="no data"):
        trainer.run([0])

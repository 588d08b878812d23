"""A run that was stopped and resumed ends where an uninterrupted one does."""

from __future__ import annotations

import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn

from medseg3d.training.checkpoint import ResumeFromLast

EPOCHS, STEPS = 5, 3


class Killed(Exception):
    pass


class Run:
    """A training run of a tiny network, built afresh as a new process would build it.

    The handlers are attached in a bundle's order: resuming first, then the learning rate, then whatever else.
    """

    def __init__(self, path, seed, kill_at=None):
        torch.manual_seed(seed)
        self.network = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=0.05)
        self.schedule = torch.optim.lr_scheduler.PolynomialLR(self.optimizer, total_iters=EPOCHS, power=0.9)
        self.rates, self.kill_at = [], kill_at
        self.engine = Engine(self.step)
        self.resume = ResumeFromLast(
            path, {"model": self.network, "optimizer": self.optimizer, "lr_scheduler": self.schedule}
        )
        self.resume.attach(self.engine)
        self.engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: self.schedule.step())

    def step(self, engine, batch):
        if engine.state.iteration == self.kill_at:
            raise Killed
        self.rates.append(self.optimizer.param_groups[0]["lr"])
        self.optimizer.zero_grad()
        self.network(batch).square().mean().backward()
        self.optimizer.step()

    def __call__(self, epochs=EPOCHS):
        generator = torch.Generator().manual_seed(0)
        batches = [torch.randn(6, 4, generator=generator) for _ in range(STEPS)]
        self.engine.run(batches, max_epochs=epochs)
        return self


def same_state(a, b):
    a, b = a.network.state_dict(), b.network.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def uninterrupted(tmp_path):
    return Run(tmp_path / "whole" / "last.pt", seed=0)()


@pytest.mark.parametrize("stops", [(2,), (1, 2, 4)])
def test_stopped_after_an_epoch(stops, uninterrupted, tmp_path):
    path, rates = tmp_path / "parts" / "last.pt", []
    for n, epochs in enumerate((*stops, EPOCHS)):
        run = Run(path, seed=n)(epochs)  # a new seed each time: only the file can carry the weights over
        rates += run.rates
    assert rates == pytest.approx(uninterrupted.rates)
    assert same_state(run, uninterrupted)
    assert run.engine.state.epoch == EPOCHS and run.engine.state.iteration == EPOCHS * STEPS


def test_killed_within_an_epoch(uninterrupted, tmp_path):
    """The run goes on after the last whole epoch; the killed epoch is run again."""
    path = tmp_path / "last.pt"
    with pytest.raises(Killed):
        Run(path, seed=0, kill_at=2 * STEPS + 2)()
    resumed = Run(path, seed=1)()
    assert len(resumed.rates) == (EPOCHS - 2) * STEPS
    assert same_state(resumed, uninterrupted)


def test_killed_before_the_first_file_starts_afresh(uninterrupted, tmp_path):
    path = tmp_path / "last.pt"
    with pytest.raises(Killed):
        Run(path, seed=0, kill_at=STEPS)()
    assert not path.exists()
    assert same_state(Run(path, seed=0)(), uninterrupted)


def test_a_finished_run_is_not_trained_further(uninterrupted):
    again = Run(uninterrupted.resume.path, seed=1)()
    assert again.rates == [] and same_state(again, uninterrupted)


def test_a_failed_save_leaves_the_last_file(uninterrupted, monkeypatch):
    path = uninterrupted.resume.path
    before = path.read_bytes()

    def full_disk(checkpoint, target):
        target.write_bytes(b"half a checkpoint")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match=r"cannot write .*last\.pt: no space left"):
        uninterrupted.resume.save(uninterrupted.engine)
    assert path.read_bytes() == before


def test_one_file_remains(uninterrupted):
    assert [file.name for file in uninterrupted.resume.path.parent.iterdir()] == ["last.pt"]

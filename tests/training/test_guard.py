"""What happens when a loss is not finite: once the run goes back and on, the second time it stops."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from ignite.engine import Engine
from torch import nn

from medseg3d.training import Diverged, Guarded, SegmentationIteration, WarmupCosine
from medseg3d.training.guard import GuardEvents


class Run:
    """A network that learns to give 1, in steps of which some have a loss that is not a number."""

    def __init__(self, bad=(), every=2, bad_cases=()):
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=0.1)
        self.schedule = WarmupCosine(self.optimizer, 100, 0.0)
        self.bad, self.bad_cases, self.tries = list(bad), bad_cases, []
        self.step = Guarded(SegmentationIteration(dtype=torch.float32), every=every)
        self.states = []
        self.engine = SimpleNamespace(
            state=SimpleNamespace(device="cpu", iteration=0),
            network=self.network,
            optimizer=self.optimizer,
            inferer=lambda image, network: network(image),
            loss_function=self.loss,
        )

    def loss(self, logits, label):
        self.tries.append(self.engine.state.iteration)
        loss = (logits - 1).square().mean()
        if self.engine.state.iteration in self.bad:
            self.bad.remove(self.engine.state.iteration)
            return loss * float("nan")
        return loss * float("nan") if set(self.cases) & set(self.bad_cases) else loss

    def __call__(self, steps):
        for _ in range(steps):
            self.engine.state.iteration += 1
            generator = torch.Generator().manual_seed(self.engine.state.iteration)
            self.cases = [f"patient{self.engine.state.iteration}", "other"]
            image = torch.randn(2, 1, 4, 4, generator=generator)
            self.states.append({name: value.clone() for name, value in self.network.state_dict().items()})
            self.output = self.step(self.engine, {"image": image, "label": image, "case": self.cases})
            self.schedule.step()
        return self


def test_without_a_failure_nothing_is_different():
    plain = Run()
    plain.step = plain.step.iteration
    guarded, plain = Run()(6), plain(6)
    ours, theirs = guarded.network.state_dict(), plain.network.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert guarded.optimizer.param_groups[0]["lr"] == plain.optimizer.param_groups[0]["lr"]


def test_it_goes_back_once_with_a_lower_rate_and_tries_the_batch_again(caplog):
    run = Run(bad=[6], every=4)
    seen = []
    run.step.iteration = lambda engine, batch, step=run.step.iteration: (
        seen.append({name: value.clone() for name, value in run.network.state_dict().items()}),
        step(engine, batch),
    )[1]
    with caplog.at_level(logging.WARNING, "medseg3d.training.guard"):
        run(6)
    assert run.tries == [1, 2, 3, 4, 5, 6, 6] and torch.isfinite(run.output["loss"])
    good = run.states[3]  # of before iteration 4
    assert all(torch.equal(seen[-1][name], good[name]) for name in good)
    assert not torch.equal(seen[-2]["0.weight"], good["0.weight"])
    usual = Run()(6)
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * usual.optimizer.param_groups[0]["lr"])
    (message,) = caplog.messages
    assert "the loss became nan at iteration 6 (patient6, other)" in message and "weights of iteration 3" in message


def test_it_tells_the_engine():
    run, told = Run(bad=[3]), []
    engine = Engine(lambda *_: None)
    for name in ("network", "optimizer", "inferer", "loss_function"):
        setattr(engine, name, getattr(run.engine, name))
    engine.state.device = "cpu"
    engine.register_events(*GuardEvents)
    engine.add_event_handler(GuardEvents.WENT_BACK, lambda: told.append(run.engine.state.iteration))
    step = run.step
    run.step = lambda _, batch: (setattr(engine.state, "iteration", run.engine.state.iteration), step(engine, batch))[1]
    run(5)
    assert told == [3]


def test_the_second_failure_names_its_cases_and_the_first():
    run = Run(bad=[3, 5])
    with pytest.raises(Diverged, match=r"iteration 5 \(patient5, other\).*lowered before.*iteration 3 \(patient3"):
        run(5)
    assert all(torch.isfinite(value).all() for value in run.network.state_dict().values())


def test_a_case_that_cannot_be_learned_from_ends_the_run_at_once():
    run = Run(bad_cases=["patient4"])
    with pytest.raises(Diverged, match=r"\(patient4, other\), and again .* look at these cases"):
        run(9)
    assert run.tries == [1, 2, 3, 4, 4]


def test_a_failure_in_the_first_step_of_all():
    run = Run(bad=[1])(2)
    assert run.tries == [1, 1, 2] and run.step.failure


def test_a_resumed_run_remembers():
    first = Run(bad=[2])(3)
    resumed = Run(bad=[4])
    resumed.step.load_state_dict(first.step.state_dict())
    with pytest.raises(Diverged, match="lowered before"):
        resumed(4)


@pytest.mark.parametrize("settings", [{"every": 0}, {"factor": 1.0}, {"factor": 0.0}])
def test_what_it_refuses(settings):
    with pytest.raises(ValueError, match="every must be 1 or more and factor between 0 and 1"):
        Guarded(SegmentationIteration(), **settings)

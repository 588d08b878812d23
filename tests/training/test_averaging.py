"""The average of the weights, worked out by hand."""

from __future__ import annotations

import pytest
import torch
from ignite.engine import Engine
from torch import nn

from medseg3d.training import AveragedWeights
from medseg3d.training.guard import GuardEvents


def averaged(weights, decay):
    """The average after a run in which the weight takes these values one after another."""
    network = nn.Linear(1, 1, bias=False)
    ema, values = AveragedWeights(network, decay), iter(weights)
    engine = Engine(lambda engine, batch: nn.init.constant_(network.weight, next(values)))
    ema.attach(engine)
    engine.run(range(len(weights)), max_epochs=1)
    return ema


def test_the_first_steps_are_forgotten_soon():
    """Shares kept: 0, then 1 / 10, 2 / 11, ... until the decay."""
    assert averaged([5.0], 0.999).network.weight.item() == 5
    assert averaged([5.0, 1.0], 0.999).network.weight.item() == pytest.approx(1.4)
    assert averaged([5.0, 1.0, 2.0], 0.999).network.weight.item() == pytest.approx(2 / 11 * 1.4 + 9 / 11 * 2)
    assert averaged([5.0, 1.0, 2.0], 0.05).network.weight.item() == pytest.approx(0.05 * 1.2 + 0.95 * 2)
    assert averaged([5.0, 1.0], 0).network.weight.item() == 1


def test_what_is_trained_stays_as_it_is_and_buffers_are_copied():
    network = nn.BatchNorm1d(2)
    ema = AveragedWeights(network)
    network.running_mean.fill_(3.0)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    ema.update()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert ema.network.running_mean.tolist() == [3, 3] and not ema.network.training
    assert not any(parameter.requires_grad for parameter in ema.network.parameters())


def test_a_resumed_average_goes_on():
    whole = averaged([5.0, 1.0, 2.0], 0.9)
    part = averaged([5.0, 1.0], 0.9)
    fresh = AveragedWeights(nn.Linear(1, 1, bias=False), 0.9)
    fresh.load_state_dict(part.state_dict())
    nn.init.constant_(fresh._trained.weight, 2.0)
    fresh.update()
    assert torch.equal(fresh.network.weight, whole.network.weight)


def test_it_begins_anew_where_the_guard_goes_back():
    network = nn.Linear(1, 1, bias=False)
    ema, values = AveragedWeights(network, 0.9), iter([5.0, 1e6, 2.0, 3.0])

    def step(engine, batch):
        nn.init.constant_(network.weight, next(values))
        if engine.state.iteration == 3:
            engine.fire_event(GuardEvents.WENT_BACK)

    engine = Engine(step)
    ema.attach(engine)
    engine.run(range(4), max_epochs=1)
    assert ema.network.weight.item() == pytest.approx(0.1 * 2 + 0.9 * 3)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_out_of_range(decay):
    with pytest.raises(ValueError, match="0 or more and below 1"):
        AveragedWeights(nn.Linear(1, 1), decay)

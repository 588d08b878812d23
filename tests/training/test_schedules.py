"""Learning rates over a run."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from medseg3d.training import WarmupCosine


def rates(total, warmup, steps=None, lower_at=None):
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=2.0)
    schedule, found = WarmupCosine(optimizer, total, warmup), []
    for step in range(total + 1 if steps is None else steps):
        found.append(optimizer.param_groups[0]["lr"])
        if step == lower_at:
            optimizer.param_groups[0]["initial_lr"] *= 0.5
        optimizer.step()
        schedule.step()
    return found


def test_it_rises_and_falls():
    assert rates(8, 0) == pytest.approx([2, 1.9239, 1.7071, 1.3827, 1, 0.6173, 0.2929, 0.0761, 0], abs=1e-4)
    assert rates(3, 0.9) == pytest.approx(
        [2 / 3, 4 / 3, 2, 0]
    )  # a warm-up of nearly all still ends at the highest rate
    assert rates(8, 0.5) == pytest.approx([0.4, 0.8, 1.2, 1.6, 2, 1.7071, 1, 0.2929, 0], abs=1e-4)


def test_beyond_its_end_it_stays_at_0():
    assert rates(4, 0.0, steps=7)[-3:] == [0, 0, 0]


def test_whoever_lowers_the_first_rate_lowers_the_rest():
    usual, lowered = rates(8, 0.25), rates(8, 0.25, lower_at=3)
    assert lowered[:4] == usual[:4] and lowered[4:] == pytest.approx([rate / 2 for rate in usual[4:]])


def test_a_resumed_schedule_goes_on_and_may_end_elsewhere():
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=2.0)
    schedule = WarmupCosine(optimizer, 16, 0.0)
    schedule.load_state_dict({"last_epoch": 8, "total_iters": 16})
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(rates(16, 0.0)[9])


@pytest.mark.parametrize(("total", "warmup"), [(0, 0.0), (4, 1.0), (4, -0.1)])
def test_what_it_refuses(total, warmup):
    with pytest.raises(ValueError, match="must be"):
        WarmupCosine(torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0), total, warmup)

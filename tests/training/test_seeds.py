"""Each epoch draws its own random numbers, whatever was drawn before."""

from __future__ import annotations

import random

import numpy as np
import torch
from ignite.engine import Engine
from monai.data import CacheDataset, DataLoader
from monai.transforms import Compose, Identityd, RandShiftIntensityd
from monai.utils import set_determinism

from medseg3d.training import SeedEveryEpoch


def draws(epochs, before=0, seed=0, workers=0, start=0):
    """What each step of a run sees: the batch after a random transform, and numbers of every generator."""
    shift = RandShiftIntensityd("image", 1.0, prob=1.0)
    data = [{"image": torch.full((1,), 10.0 * n)} for n in range(5)]
    dataset = CacheDataset(data, Compose([Identityd("image"), shift]), progress=False)
    loader = DataLoader(dataset, batch_size=2, shuffle=True, num_workers=workers)
    torch.rand(before), [random.random() for _ in range(before)], shift.R.rand(before)
    seen = []

    def step(engine, batch):
        numbers = [torch.rand(1).item(), np.random.get_state()[1][0], random.random()]  # noqa: NPY002
        seen.append([engine.state.epoch, *batch["image"].flatten().tolist(), *numbers])

    engine = Engine(step)
    SeedEveryEpoch(seed).attach(engine)
    if start:
        engine.load_state_dict({"epoch": start, "epoch_length": 4, "max_epochs": epochs})
        engine.run(loader)
    else:
        engine.run(loader, max_epochs=epochs, epoch_length=4)
    return seen


def test_epochs_differ_and_repeat_from_run_to_run():
    first = draws(3)
    assert len({tuple(row[1:]) for row in first}) == len(first) == 12
    assert draws(3, before=7) == first
    assert draws(3, seed=1) != first


def test_a_run_that_begins_later_sees_what_it_would_have_seen():
    whole = draws(4)
    assert draws(4, before=3, start=2) == [row for row in whole if row[0] > 2]


def test_workers_draw_the_same_again():
    whole = draws(2, workers=1)
    assert draws(2, workers=1, before=3, start=1) == [row for row in whole if row[0] > 1]


def teardown_module():
    set_determinism(None)

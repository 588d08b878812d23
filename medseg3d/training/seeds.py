"""Randomness that depends on the epoch alone, so that a resumed run draws what an uninterrupted one would."""

from __future__ import annotations

import random

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data.utils import set_rnd


class SeedEveryEpoch:
    """Handler that sets every source of random numbers at the start of each epoch, from ``seed``, epoch and process.

    These are torch's (from which data loaders take their order and the seeds of their workers), NumPy's and Python's
    generators, and those of MONAI's transforms. The pass through the data begins anew with each epoch. So there is no
    state to save: a run that was killed and resumed after its last whole epoch repeats the one that was not. (Workers
    that outlive an epoch, ``persistent_workers``, keep their own state and are not exact.)

    Args:
        seed: of the run; another one gives another run.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self._set)

    def _set(self, engine: Engine) -> None:
        words = np.random.SeedSequence([self.seed, engine.state.epoch, idist.get_rank()]).generate_state(4)
        torch_seed, numpy_seed, python_seed, transforms_seed = (int(word) for word in words)
        torch.manual_seed(torch_seed)
        np.random.seed(numpy_seed)  # noqa: NPY002 -- transforms of others may use it
        random.seed(python_seed)
        loader = engine.state.dataloader
        set_rnd(getattr(loader, "dataset", None), transforms_seed)
        if loader is not None:
            engine.set_data(loader)

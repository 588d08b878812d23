"""A training run that can be stopped at any time and goes on where it was."""

from __future__ import annotations

import logging
import math
import pickle
import textwrap
from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.engines import Evaluator
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from medseg3d.io import write_atomic

logger = logging.getLogger(__name__)

_ENDS = ("total_iters", "total_steps", "_schedule_phases")  # of schedules: the last two are OneCycleLR's


class BestWeights:
    """Handler of an evaluator that keeps the weights with the best key metric, in the format of ``models/model.pt``.

    A new file takes the place of the old one only when it is whole: a killed run, or a full disk, leaves the earlier
    best. Put it into the ``save_dict`` of :class:`ResumeFromLast`, so that a worse network of a resumed run does not
    replace a better one.

    Args:
        path: the file.
        network: whose ``state_dict`` is kept, such as ``ema.network``; without ``DistributedDataParallel``'s prefix.
    """

    def __init__(self, path: str | Path, network: nn.Module) -> None:
        self.path = Path(path)
        self.network = network
        self.best: float | None = None

    def attach(self, engine: Evaluator) -> None:
        engine.add_event_handler(Events.COMPLETED, self._look)

    def _look(self, engine: Evaluator) -> None:
        metric = engine.state.key_metric_name
        if metric not in engine.state.metrics:
            raise ValueError("BestWeights needs a key metric to go by: give the evaluator a key_val_metric")
        score = float(engine.state.metrics[metric])
        if math.isnan(score) or not (self.best is None or engine.metric_cmp_fn(score, self.best)):
            return
        state = unwrapped(self.network).state_dict()
        write_atomic(self.path, lambda file: torch.save(state, file))
        self.best = score

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best = state["best"]


class ResumeFromLast:
    """Handler that saves everything after each epoch and, when a run starts, takes up what the last one left.

    MONAI's ``CheckpointLoader`` and ``CheckpointSaver`` cannot hold the trainer itself in a bundle's config, because
    the trainer holds them. A file takes the place of the last one only when it is whole. With several processes each
    loads it and the first one writes it; parameters keep the names that they have without ``DistributedDataParallel``,
    so a run may go on with another number of processes. It may also go on to more epochs, unless it had ended and its
    learning rate is 0: then, and where the file is damaged or another train.json's, the handler raises ValueError. The
    highest learning rate stays what it was.

    Args:
        path: the checkpoint file; a run starts afresh where it does not exist.
        save_dict: name -> object with ``state_dict`` and ``load_state_dict``.
    """

    def __init__(self, path: str | Path, save_dict: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.save_dict = dict(save_dict)

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self._start)

    def _start(self, engine: Engine) -> None:
        # Handlers run in the order of their attachment. To be the last of each epoch, so that what the others do there
        # (a step of the learning rate, validation) is in the file, saving is attached when all others are.
        loader = engine.state.dataloader
        if isinstance(loader, Sized) and not len(loader):  # epochs would pass without a step, and end well
            raise ValueError(
                "there is no batch to train on: batch_size is larger than the number of training cases, or than each "
                "process's share of them; lower it"
            )
        self.load(engine)
        if not engine.has_event_handler(self.save, Events.EPOCH_COMPLETED):
            engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)

    def load(self, engine: Engine) -> None:
        if not self.path.is_file():
            return
        try:
            checkpoint = torch.load(self.path, map_location="cpu", weights_only=True)
        except (EOFError, RuntimeError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"{self.path} is damaged, so its run cannot go on: delete it, or choose another output folder"
            ) from error
        missing = [name for name in self.save_dict if name not in checkpoint]
        if missing:
            raise ValueError(
                f"{self.path} has no {', '.join(missing)}: another train.json wrote it, so its run cannot go on with "
                "this one; choose another output folder"
            )
        steps = engine.state.epoch_length or 0
        if checkpoint["iteration"] != checkpoint["epoch"] * steps:
            raise ValueError(
                f"the run in {self.path} had {checkpoint['iteration'] // max(checkpoint['epoch'], 1)} iterations an "
                f"epoch, so it cannot go on with {steps}: give the number it had, or choose another output folder"
            )
        asked = self._rates()
        for name, target in self.save_dict.items():
            state = checkpoint[name]
            ends = {end: getattr(target, end) for end in _ENDS if hasattr(target, end)}
            if ends:  # a schedule of the learning rate now ends where this run shall end
                state = {**state, **ends}
            try:
                unwrapped(target).load_state_dict(state)
            except (RuntimeError, ValueError, KeyError) as error:
                reason = textwrap.shorten(str(error), 200, placeholder=" ...")
                raise ValueError(
                    f"{name} in {self.path} does not fit: another train.json wrote it, so its run cannot go on with "
                    f"this one; choose another output folder ({reason})"
                ) from error
        if asked != self._rates():
            logger.warning("the run goes on with its own learning rate, %s, not with %s", self._rates(), asked)
        engine.state.epoch = checkpoint["epoch"]
        engine.state.iteration = checkpoint["iteration"]
        self._check_rate(engine)
        logger.info("resumed from %s after epoch %d", self.path, engine.state.epoch)

    def _rates(self) -> list[float]:
        """The learning rates that schedules start from."""
        groups = (group for target in self.save_dict.values() for group in getattr(target, "param_groups", ()))
        return [group.get("initial_lr", group["lr"]) for group in groups]

    def _check_rate(self, engine: Engine) -> None:
        rates = [group["lr"] for target in self.save_dict.values() for group in getattr(target, "param_groups", ())]
        if rates and not any(rates) and engine.state.epoch < (engine.state.max_epochs or 0):
            raise ValueError(
                f"the run in {self.path} ended at epoch {engine.state.epoch}, where its learning rate had come down to "
                "0, so it cannot go on; start a new run from its weights, in another output folder with load_pretrain "
                "true and ckpt_path its best.pt"
            )

    def save(self, engine: Engine) -> None:
        if idist.get_rank() > 0:
            return
        checkpoint = {name: unwrapped(source).state_dict() for name, source in self.save_dict.items()}
        checkpoint |= {"epoch": engine.state.epoch, "iteration": engine.state.iteration}
        write_atomic(self.path, lambda file: torch.save(checkpoint, file))


def unwrapped(item: Any) -> Any:
    """The network within ``DistributedDataParallel``; anything else itself."""
    return item.module if isinstance(item, DistributedDataParallel) else item

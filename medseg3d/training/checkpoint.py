"""A training run that can be stopped at any time and goes on where it was."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.handlers import CheckpointSaver
from torch.nn.parallel import DistributedDataParallel

logger = logging.getLogger(__name__)


class ResumeFromLast:
    """Handler that saves everything after each epoch and, when a run starts, takes up what the last one left.

    MONAI's ``CheckpointLoader`` and ``CheckpointSaver`` cannot hold the trainer itself in a bundle's config, because
    the trainer holds them. The file is written beside its place and then renamed, so a killed run leaves the previous
    one. With several processes each loads it and the first one writes it; parameters keep the names that they have
    without ``DistributedDataParallel``, so a run may go on with another number of processes. It may also go on to more
    epochs, unless it had ended and its learning rate is 0: then the handler raises ValueError.

    Args:
        path: the checkpoint file; a run starts afresh where it does not exist.
        save_dict: name -> object with ``state_dict`` and ``load_state_dict``.
        best_saver: the handler that keeps the best checkpoint of the validation; it will remember the best score, so
            that a worse network of a resumed run does not replace a better one.
    """

    def __init__(
        self, path: str | Path, save_dict: Mapping[str, Any], best_saver: CheckpointSaver | None = None
    ) -> None:
        self.path = Path(path)
        self.save_dict = dict(save_dict)
        self.best_saver = best_saver

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self._start)

    def _start(self, engine: Engine) -> None:
        # Handlers run in the order of their attachment. To be the last of each epoch, so that what the others do there
        # (a step of the learning rate, validation) is in the file, saving is attached when all others are.
        self.load(engine)
        if not engine.has_event_handler(self.save, Events.EPOCH_COMPLETED):
            engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)

    def load(self, engine: Engine) -> None:
        if not self.path.is_file():
            return
        checkpoint = torch.load(self.path, map_location="cpu", weights_only=True)
        missing = [name for name in self.save_dict if name not in checkpoint]
        if missing:
            raise ValueError(
                f"{self.path} has no {', '.join(missing)}: another train.json wrote it, so its run cannot go on with "
                "this one; choose another output folder"
            )
        for name, target in self.save_dict.items():
            state = checkpoint[name]
            if hasattr(target, "total_iters"):  # a schedule of the learning rate now ends where this run shall end
                state = {**state, "total_iters": target.total_iters}
            unwrapped(target).load_state_dict(state)
        if self.best_saver is not None and "best" in checkpoint:
            self.best_saver.load_state_dict(checkpoint["best"])
        engine.state.epoch = checkpoint["epoch"]
        engine.state.iteration = checkpoint["iteration"]
        self._check_rate(engine)
        logger.info("resumed from %s after epoch %d", self.path, engine.state.epoch)

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
        self.path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint = {name: unwrapped(source).state_dict() for name, source in self.save_dict.items()}
        checkpoint |= {"epoch": engine.state.epoch, "iteration": engine.state.iteration}
        if self.best_saver is not None and self.best_saver._key_metric_checkpoint is not None:
            checkpoint["best"] = self.best_saver._key_metric_checkpoint.state_dict()
        temporary = self.path.with_suffix(".tmp")
        torch.save(checkpoint, temporary)
        os.replace(temporary, self.path)


def unwrapped(item: Any) -> Any:
    """The network within ``DistributedDataParallel``; anything else itself."""
    return item.module if isinstance(item, DistributedDataParallel) else item

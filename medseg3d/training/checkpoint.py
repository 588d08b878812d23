"""A training run that can be stopped at any time and goes on where it was."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events

logger = logging.getLogger(__name__)


class ResumeFromLast:
    """Handler that saves everything after each epoch and, when a run starts, takes up what the last one left.

    MONAI's ``CheckpointLoader`` and ``CheckpointSaver`` cannot hold the trainer itself in a bundle's config, because
    the trainer holds them. The file is written beside its place and then renamed, so a killed run leaves the previous
    one.

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
        self.load(engine)
        if not engine.has_event_handler(self.save, Events.EPOCH_COMPLETED):
            engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)

    def load(self, engine: Engine) -> None:
        if not self.path.is_file():
            return
        checkpoint = torch.load(self.path, map_location="cpu", weights_only=True)
        for name, target in self.save_dict.items():
            target.load_state_dict(checkpoint[name])
        engine.state.epoch = checkpoint["epoch"]
        engine.state.iteration = checkpoint["iteration"]
        logger.info("resumed from %s after epoch %d", self.path, engine.state.epoch)

    def save(self, engine: Engine) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint = {name: source.state_dict() for name, source in self.save_dict.items()}
        checkpoint |= {"epoch": engine.state.epoch, "iteration": engine.state.iteration}
        temporary = self.path.with_suffix(".tmp")
        torch.save(checkpoint, temporary)
        os.replace(temporary, self.path)

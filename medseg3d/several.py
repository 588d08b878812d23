"""Several models on the same scan: one label map, in which earlier models have priority."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medseg3d.inference.ensemble import merge_label_maps
from medseg3d.segmentation import Scan, Segmentation
from medseg3d.segmenter import Segmenter

if TYPE_CHECKING:
    from medseg3d.batch import CaseResult


class SeveralModels:
    """Models that segment a scan one after another, with ``predict``, ``predict_many``, ``read`` and ``segment`` of one
    :class:`medseg3d.segmenter.Segmenter`.

    Where two models name a voxel, the earlier one has it. A label keeps its number unless an earlier model has it.
    Beside the scan and one model's work, a label map for each model is held.

    Args:
        models: in the order of their priority.
        unite: labels of the same name become one.

    Raises:
        ValueError: there is no model, one has uncertainty, or two have a label name in common and ``unite`` is false.
    """

    pictures = None  # for scans, as its models

    def __init__(self, models: Sequence[Segmenter], unite: bool = False) -> None:
        if not models:
            raise ValueError("several models are one or more, got none")
        if any(model.uncertainty for model in models):
            raise ValueError("uncertainty is of one model's classes: load several without it, or run them one by one")
        if not unite:
            _require_other_names(models)
        self.models = tuple(models)
        self.unite = unite
        nothing = [np.zeros((1, 1, 1), np.uint8)] * len(models)
        self.table = merge_label_maps(nothing, [model.table for model in models], unite)[1]
        self.name = " + ".join(model.name for model in models)
        self.device = models[0].device
        self.notes = tuple(f"{model.name}: {note}" for model in models for note in model.notes)
        self.record = _record([model.record for model in models])

    @property
    def labels(self) -> dict[int, str]:
        """Label number -> name."""
        return dict(self.table.names)

    @property
    def precision(self) -> str:
        """In which precision each network runs, and why."""
        return "; ".join(f"{model.name}: {model.precision}" for model in self.models)

    @property
    def limited(self) -> bool:
        """Whether the memory of one of the models has a limit."""
        return any(model.limited for model in self.models)

    def predict(
        self, image: Any, allow_non_hu: bool = False, progress: Callable[[str], None] | None = None
    ) -> Segmentation:
        """See :meth:`medseg3d.segmenter.Segmenter.predict`."""
        return self.segment(self.read(image, allow_non_hu, progress), progress)

    def read(self, image: Any, allow_non_hu: bool = False, progress: Callable[[str], None] | None = None) -> Scan:
        """Read one scan and check it as the strictest of the models wants it."""
        strictest = next((model for model in self.models if model.expects_hu), self.models[0])
        return strictest.read(image, allow_non_hu, progress)

    def segment(self, scan: Scan, progress: Callable[[str], None] | None = None) -> Segmentation:
        """Segment a scan that was read with every model, and merge."""
        label_maps: list[np.ndarray] = []
        warnings, seconds = [*scan.warnings], Counter[str]()
        for model in self.models:
            result = model.segment(Scan(scan.volume), progress)
            label_maps.append(result.segmentation.array)
            warnings += [f"{model.name}: {warning}" for warning in result.warnings]
            seconds.update(result.seconds)
        merged, _ = merge_label_maps(label_maps, [model.table for model in self.models], self.unite)
        stages = {**scan.seconds, **seconds}
        return Segmentation(scan.volume.with_array(merged), scan.volume, self.table, self.name, tuple(warnings), stages)

    def predict_many(
        self, inputs: Sequence[str | Path] | str | Path, output_dir: str | Path, resume: bool = False, **options: Any
    ) -> Iterator[CaseResult]:
        """Segment every scan among ``inputs`` and write the results; see :func:`medseg3d.batch.predict_many`."""
        from medseg3d.batch import predict_many

        return predict_many(self, inputs, output_dir, resume=resume, **options)

    def describe_device(self) -> str:
        """Where the networks run, for reports."""
        return self.models[0].describe_device()


def _require_other_names(models: Sequence[Segmenter]) -> None:
    for earlier, later in itertools.combinations(models, 2):
        if shared := [name for name in later.labels.values() if name in earlier.labels.values()]:
            names = ", ".join(shared[:3]) + ", ..." * (len(shared) > 3)
            raise ValueError(
                f"{earlier.name} and {later.name} both have the label {names}: say --unite (in Python: unite=True) to "
                "make one label of those of one name, or run the models one by one"
            )


def _record(records: Sequence[Any]) -> dict[str, Any]:
    """What a run report says of all models; one hash stands for those of all bundles."""
    hashes = [f"{record.get('bundle_sha256')} {record.get('settings')}" for record in records]
    return {
        "name": " + ".join(str(record.get("name")) for record in records),
        "version": None,
        "bundle_sha256": hashlib.sha256("\n".join(hashes).encode()).hexdigest(),
        "models": [dict(record) for record in records],
    }

"""One model on one case after another: the segmentation against the reference, and what it took."""

from __future__ import annotations

import gc
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

from medseg3d.bundle import load_model
from medseg3d.compare.contenders import Conditions, Contender, numbers_of, renumbered
from medseg3d.compare.operations import Operations, Watched
from medseg3d.data.datasets import Case
from medseg3d.errors import in_words
from medseg3d.inference.strategy import plain
from medseg3d.recipe import as_strategy
from medseg3d.report.evaluation import evaluate_volumes, read_label_map, require_numbers
from medseg3d.report.run import count_peak_anew, recent_peak_mb
from medseg3d.segmentation import Segmentation
from medseg3d.segmenter import Segmenter
from medseg3d.trial import current_memory
from medseg3d.version import __version__

MIB = 2**20


class Bench:
    """A model, loaded once, that is measured on case after case.

    Raises:
        ValueError and others of :func:`medseg3d.load_model`.
    """

    def __init__(self, contender: Contender, conditions: Conditions) -> None:
        self.conditions = conditions
        start = time.perf_counter()
        loaded = load_model(
            contender.bundle.path.absolute(),
            conditions.device,
            conditions.trust,
            precision=conditions.precision,
            strategy=contender.strategy,
        )
        load_seconds = time.perf_counter() - start
        assert isinstance(loaded, Segmenter), "pictures are refused before"
        self.model = loaded
        self.watched = self.model.preprocessing = Watched(loaded.preprocessing)
        strategy = as_strategy(loaded.inferer)
        self.operations = Operations(loaded.network, strategy)
        self.facts: dict[str, Any] = {
            "model": loaded.name,
            "strategy": type(loaded.inferer if strategy is None else strategy).__name__,
            "parameters": sum(p.numel() for p in loaded.network.parameters()),
            "load_seconds": round(load_seconds, 2),
            "machine": machine(loaded.describe_device()),
        }

    def measure(self, case: Case, prediction: Path) -> dict[str, Any]:
        """The rows of the case's organs and its costs, ready for JSON; the segmentation is written to ``prediction``.

        The seconds go from the scan's file to its label map, without the writing of it. The peak is that of the whole
        process, counted from where the case begins. Metrics and the count of operations come after.
        """
        gc.collect()
        cuda = self.model.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.model.device)
        held = current_memory()
        count_peak_anew()
        wall, processor = time.perf_counter(), time.process_time()
        result = self.model.predict(case.images[0])
        costs: dict[str, Any] = {
            "seconds": time.perf_counter() - wall,
            "cpu_seconds": time.process_time() - processor,
            "network_seconds": result.seconds.get("network"),
            "peak_memory_mb": recent_peak_mb(),
            "held_before_mb": round(held / MIB, 1),
            "device_peak_mb": torch.cuda.max_memory_allocated(self.model.device) / MIB if cuda else None,
        }
        notes = [*self.model.notes, *result.warnings]
        costs |= self._operations(notes)
        result.save(prediction)
        precision = self.model.precision
        return {**self.facts, "precision": precision, "costs": costs, "rows": self._rows(result, case), "notes": notes}

    def _operations(self, notes: list[str]) -> dict[str, Any]:
        image, self.watched.image = self.watched.image, None
        try:
            found = self.operations.count(plain(image)[None])
        except Exception as error:  # of somebody's network, on tensors that have no values
            found = None
            notes.append(f"its operations could not be counted: {in_words(error)}")
        windows, flops = (None, None) if found is None else found
        return {"windows": windows, "gflop": None if flops is None else flops / 1e9}

    def _rows(self, result: Segmentation, case: Case) -> list[dict[str, Any]]:
        assert case.label is not None, "cases without a reference are refused before"
        labels = self.conditions.labels
        numbers = numbers_of(result.labels, labels)
        predicted = renumbered(result.segmentation, numbers)
        shared = {number: labels[number] for number in numbers.values()}
        names = f"the segmentation of {case.name}", str(case.label)
        reference = read_label_map(case.label)
        require_numbers(case.label, labels)
        return evaluate_volumes(predicted, reference, shared, self.conditions.nsd_tolerance_mm, case.annotated, names)


def machine(device: str) -> str:
    """One line on where models ran: processor, cores and threads, device, versions; no name of a host."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = [_processor(), f"{torch.get_num_threads()} of {cores} cores", *([] if device == "cpu" else [device])]
    return ", ".join([*facts, platform.system(), f"torch {torch.__version__}", f"medseg3d {__version__}"])


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.processor() or platform.machine()])[0]

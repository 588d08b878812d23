"""What a run was: software, model, device, time, memory, inputs and outputs, for a JSON file beside the results."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from medseg3d.geometry import Geometry
from medseg3d.io.digest import file_sha256
from medseg3d.report.records import grid_record, write_json
from medseg3d.version import __version__

_PACKAGES = ("medseg3d", "numpy", "scipy", "torch", "monai", "nibabel", "SimpleITK")
_DECISIVE = ("configs", "scripts", "models")  # the folders of a bundle on which its results depend

T = TypeVar("T")


class Stopwatch:
    """Seconds per stage of a run: `with stopwatch.stage("read"): ...`; a stage entered again adds up.

    A stage within another is no part of it. `seconds` maps each stage to its seconds so far, in the order of first
    entry.

    Args:
        progress: called with the name of each stage as it is first entered.
    """

    def __init__(self, progress: Callable[[str], None] | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress
        self._within: list[float] = []  # seconds of the stages inside each stage that is on

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the block under `name`, also when it raises."""
        if name not in self.seconds and self._progress is not None:
            self._progress(name)
        start = time.perf_counter()
        self.seconds.setdefault(name, 0.0)
        self._within.append(0.0)
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            self.seconds[name] += elapsed - self._within.pop()
            if self._within:
                self._within[-1] += elapsed

    def each(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """The items, with the time that each takes to come under `name`."""
        iterator = iter(items)
        while True:
            with self.stage(name):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item


def versions() -> dict[str, str | None]:
    """Versions of Python, this platform and the packages that matter, None where one is not installed; imports none."""
    found: dict[str, str | None] = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = __version__ if package == "medseg3d" else None  # a checkout that was not installed
    return found


def input_sha256(path: str | Path) -> str:
    """sha256 of a scan: of its file, or of the names and contents of the files in its folder."""
    if Path(path).is_file():
        return file_sha256(path)
    digest = hashlib.sha256()
    for file in sorted(file for file in Path(path).iterdir() if file.is_file()):
        digest.update(f"{file.name}\0{file_sha256(file)}\n".encode())
    return digest.hexdigest()


def bundle_sha256(folder: str | Path) -> str:
    """sha256 over what decides a bundle's results: names and contents of the files in configs, scripts and models."""
    digest = hashlib.sha256()
    paths = (path for part in _DECISIVE for path in Path(folder, part).rglob("*"))
    for path in sorted(path for path in paths if path.is_file() and path.suffix != ".pyc"):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{file_sha256(path)}\n".encode())
    return digest.hexdigest()


_earlier_peaks_mb: list[float] = []  # of this process, each forgotten by the system when a new count was begun


def peak_memory_mb() -> float | None:
    """The most memory (resident set, MiB) that this process has held so far; None where the system does not say."""
    recent = recent_peak_mb()
    return None if recent is None else max([recent, *_earlier_peaks_mb])


def recent_peak_mb() -> float | None:
    """The same since :func:`count_peak_anew`."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1 << 20 if sys.platform == "darwin" else 1 << 10), 1)


def count_peak_anew() -> None:
    """Let :func:`recent_peak_mb` begin with what is held now, where the system can (Linux)."""
    peak = recent_peak_mb()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        if peak is not None:
            _earlier_peaks_mb[:] = [max([peak, *_earlier_peaks_mb])]


def model_record(
    name: str, version: str | None, bundle: str | Path, weights: str | Path | None = None
) -> dict[str, Any]:
    """A model for the report: name, version, and where its bundle and weights lie with the sha256 of each."""
    return {
        "name": name,
        "version": version,
        "bundle": str(bundle),
        "bundle_sha256": bundle_sha256(bundle),
        "weights": None if weights is None else str(weights),
        "weights_sha256": None if weights is None else file_sha256(weights),
    }


def case_record(
    name: str,
    source: str | Path,
    geometry: Geometry | None = None,
    outputs: Mapping[str, str | Path] | None = None,
    seconds: Mapping[str, float] | None = None,
    warnings: Sequence[str] = (),
    error: str | None = None,
    crop: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A case for the report: its input with the grid (None if it could not be read), outputs by kind, times, messages.

    ``crop`` is the box that windows were laid over where they did not go over the whole image, and the share left out.
    Paths are recorded as they were given, so a relative path stays relative.
    """
    return {
        "name": name,
        "input": str(source),
        "grid": None if geometry is None else grid_record(geometry),
        "outputs": {kind: str(path) for kind, path in (outputs or {}).items()},
        "seconds": _rounded(seconds or {}),
        "warnings": list(warnings),
        "error": error,
        **({} if crop is None else {"crop": dict(crop)}),
    }


def run_report(
    model: Mapping[str, Any],
    cases: Sequence[Mapping[str, Any]],
    device: str,
    threads: int | None = None,
    options: Mapping[str, Any] | None = None,
    seconds: Mapping[str, float] | None = None,
    device_peak_memory_mb: float | None = None,
    warnings: Sequence[str] = (),
) -> dict[str, Any]:
    """The report of a run, ready for JSON, to be made at its end (the peak memory is the one so far).

    Args:
        model: from `model_record`.
        cases: from `case_record`, one per input.
        device: where the network ran, such as "cpu" or "cuda:0 (its name)".
        threads: CPU threads of the network.
        options: the choices of the user that may change a result.
        seconds: stages of the whole run, such as loading the model; those of a case are in its record.
        device_peak_memory_mb: the most memory held on an accelerator, MiB.
        warnings: messages on the run as a whole.
    """
    return {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "model": dict(model),
        "device": device,
        "threads": threads,
        "cpus": os.cpu_count(),
        "options": dict(options or {}),
        "seconds": _rounded(seconds or {}),
        "peak_memory_mb": peak_memory_mb(),
        "device_peak_memory_mb": device_peak_memory_mb,
        "warnings": list(warnings),
        "cases": [dict(case) for case in cases],
    }


def write_run_report(path: str | Path, report: Mapping[str, Any]) -> Path:
    """Write what `run_report` returned as JSON, atomically."""
    return write_json(path, report)


def _rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {stage: round(value, 3) for stage, value in seconds.items()}

"""The cases of a training, prepared once: in memory as far as that is free, and on disk for the next run."""

from __future__ import annotations

import contextlib
import glob
import inspect
import logging
import os
import pickle
import sys
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from monai.data.utils import pickle_hashing
from monai.transforms import Compose, Transform
from monai.transforms.traits import RandomizableTrait
from torch.utils.data import Dataset

from medseg3d.io import write_atomic
from medseg3d.io.formats import split_name
from medseg3d.version import __version__

logger = logging.getLogger(__name__)

_IN_PARTS = (".mhd", ".nhdr", ".hdr", ".hdr.gz", ".img", ".img.gz")


class CachedCases(Dataset[dict[Hashable, Any]]):
    """A data set whose transforms up to the first random one run once for each case, as the data set is made.

    What they give is kept in memory until ``memory`` of what was free is taken, on the device on which they leave it;
    the processes of one machine share it out. With a ``folder`` it is written there too: cases that found no room are
    read from it, and so are all of them in the next run, unless the case, a file of it, a transform (its arguments and,
    if it is one's own, its module's code) or the version of medseg3d or MONAI changed. Files hold plain tensors,
    numbers and text (``weights_only=True``); a case with anything else, a ``MetaTensor`` for instance, is not written.
    The folder can be deleted at any time.

    Args:
        data: a dictionary for each case.
        transform: the transforms, random ones last.
        folder: where prepared cases are written; None for nowhere.
        memory: share of the free memory that may be taken, 0 to 1.
        threads: that prepare cases at the same time; None for PyTorch's number, 4 at most.
        copy: whether each access has its own copy. Without it the random transforms must not write into what they get.

    Raises:
        ValueError: a share outside 0 to 1.
    """

    def __init__(
        self,
        data: Sequence[dict[Hashable, Any]],
        transform: Compose,
        folder: str | Path | None = None,
        memory: float = 0.5,
        threads: int | None = None,
        copy: bool = True,
    ) -> None:
        if not 0 <= memory <= 1:
            raise ValueError(f"memory is a share of what is free, 0 to 1, got {memory}")
        self.data = data
        self.transform = transform
        self.copy = copy
        self._fixed = _fixed_transforms(transform)
        self._files = self._files_of_cases(None if folder is None else Path(folder))
        self._kept: dict[int, dict[Hashable, Any]] = {}
        if folder is not None or memory > 0:
            self._keep(_Room(memory), threads or min(4, torch.get_num_threads()), everything=folder is not None)
        if len(self._kept) < len(data):
            rest = "prepared anew" if folder is None else f"read from {folder}"
            logger.info(f"{len(self._kept)} of {len(data)} cases are kept in memory; the others are {rest} each time")

    def _keep(self, room: _Room, threads: int, everything: bool) -> None:
        """Cases in memory while there is room, and then ``everything`` else at least on disk."""
        with ThreadPoolExecutor(threads) as pool:
            for index, item in enumerate(pool.map(self._prepared, range(len(self.data)))):
                if room.takes(item):
                    self._kept[index] = item
                elif not everything:
                    pool.shutdown(cancel_futures=True)
                    return

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        index = range(len(self))[index]
        item = self._kept.get(index)
        if item is None:
            item = self._prepared(index)
        elif self.copy:
            item = deepcopy(item)
        return self.transform(item, start=self._fixed) if self._fixed < len(self.transform.transforms) else item

    def _prepared(self, index: int) -> dict[Hashable, Any]:
        file = self._files[index]
        if file is not None:
            with contextlib.suppress(Exception):  # whatever a damaged file raises, it is written again
                return torch.load(file, weights_only=True)
        item = _compact(self.transform(dict(self.data[index]), end=self._fixed, threading=True))
        if file is not None and _is_plain(item):
            _write(item, file)
        return item

    def _files_of_cases(self, folder: Path | None) -> list[Path | None]:
        """A name for each case that changes with everything that its prepared form depends on."""
        if folder is None:
            return [None] * len(self.data)
        try:
            recipe = pickle.dumps(self.transform.transforms[: self._fixed])
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            logger.warning(f"prepared cases are not kept in {folder}, since a transform cannot be pickled: {error}")
            return [None] * len(self.data)
        made_by = (recipe, _sources(self.transform.transforms[: self._fixed]), __version__, version("monai"))
        return [folder / f"{pickle_hashing((made_by, case, _states(case))).decode()}.pt" for case in self.data]


def _sources(transforms: Iterable[Any]) -> list[str]:
    """The code of the transforms that belong to neither medseg3d nor MONAI, whose versions tell theirs."""
    names = sorted({type(transform).__module__ for transform in transforms})
    found = []
    for name in names:
        if name.partition(".")[0] not in ("medseg3d", "monai"):
            with contextlib.suppress(OSError, TypeError, KeyError):  # typed in by hand, perhaps
                found.append(inspect.getsource(sys.modules[name]))
    return found


class _Room:
    """What may still be kept, in bytes, by device."""

    def __init__(self, share: float) -> None:
        self.share = share / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.left: dict[torch.device, float] = {}

    def takes(self, item: Mapping[Hashable, Any]) -> bool:
        needed: Counter[torch.device] = Counter()
        for device, size in _sizes(item):
            needed[device] += size
        for device in needed:
            self.left.setdefault(device, self.share * free_memory(device))
        if any(self.left[device] < size for device, size in needed.items()):
            return False
        for device, size in needed.items():
            self.left[device] -= size
        return True


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device, or for this process where a container (control group, version 2) allows less."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # no such control group, or "max"
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
        free = min(free, max(limit, 0))
    return free


def _fixed_transforms(transform: Compose) -> int:
    first = transform.get_index_of_first(lambda t: isinstance(t, RandomizableTrait) or not isinstance(t, Transform))
    return len(transform.transforms) if first is None else first


def _states(case: Mapping[Hashable, Any]) -> list[tuple[int, int]]:
    """Size and time of the last change of each file that a case names, be it by its folder or by its header."""
    named = [part for value in case.values() for part in (value if isinstance(value, (list, tuple)) else [value])]
    paths = [Path(part) for part in named if isinstance(part, (str, Path)) and os.path.exists(part)]
    files = [file for path in paths for file in _parts(path) if file.is_file()]
    return [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _parts(path: Path) -> list[Path]:
    """The files of a scan: those in its folder, or with its name where the voxels lie beside the header."""
    if path.is_dir():
        return sorted(path.rglob("*"))
    stem, suffix = split_name(path)
    beside = path.parent.glob(f"{glob.escape(stem)}.*") if suffix in _IN_PARTS else ()
    return sorted({path, *beside})


def _sizes(value: Any) -> Iterator[tuple[torch.device, int]]:
    """Device and bytes of each tensor and array, of whatever type."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _sizes(part)
    elif hasattr(value, "nbytes"):
        yield torch.device(getattr(value, "device", "cpu")), value.nbytes


def _compact(value: Any) -> Any:
    """Without what a tensor that was cut out of a larger one still holds of that."""
    if isinstance(value, dict):
        return {key: _compact(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        parts = [_compact(part) for part in value]
        return tuple(parts) if isinstance(value, tuple) else parts
    if isinstance(value, torch.Tensor) and value.untyped_storage().nbytes() > value.nbytes:
        return value.clone()
    return value


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) for key in value) and all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return type(value) in (torch.Tensor, str, bool, int, float, type(None))


def _write(item: Mapping[Hashable, Any], file: Path) -> None:
    """A disk that is full costs time later and stops no training."""
    try:
        write_atomic(file, lambda temporary: torch.save(item, temporary))
    except (OSError, RuntimeError) as error:
        logger.warning(f"a prepared case was not kept: {error}")

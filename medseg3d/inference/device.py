"""From the name of a device, as users of several tools spell it, to a torch device that is there; what it has room for,
and the way back from it.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch

SPELLINGS = "auto, cpu, gpu, gpu:N, cuda, cuda:N or mps"


def resolve_device(name: str | torch.device = "auto") -> torch.device:
    """The torch device for ``name``; "auto" takes a CUDA device, else the CPU.

    Raises:
        ValueError: the name is none of ``SPELLINGS``, or this machine has no such device.
    """
    if isinstance(name, torch.device):
        return name
    spelled = name.strip().lower()
    if spelled == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if spelled == "cpu":
        return torch.device("cpu")
    if spelled == "mps":
        if not torch.backends.mps.is_available():
            raise ValueError("device 'mps' needs an Apple GPU that this PyTorch can use; take --device cpu")
        return torch.device("mps")
    match = re.fullmatch(r"(?:gpu|cuda)(?::(\d+))?", spelled)
    if match is None:
        raise ValueError(f"unknown device {name!r}; a device is {SPELLINGS}")
    number, count = int(match[1] or 0), torch.cuda.device_count() if torch.cuda.is_available() else 0
    if number >= count:
        found = "none" if count == 0 else f"only {count} (gpu:0 to gpu:{count - 1})"
        raise ValueError(f"device {name!r} is not there: PyTorch {torch.__version__} sees {found}; take --device cpu")
    return torch.device(f"cuda:{number}")


def room_on(device: torch.device, limit: int | None = None) -> int:
    """Bytes that may still be taken on a CUDA device.

    That is what the driver has free, and what PyTorch keeps there without using it.

    Args:
        limit: for all that PyTorch uses there.
    """
    used = torch.cuda.memory_allocated(device)
    room = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - used
    return max(0, room if limit is None else min(room, limit - used))


class Returning:
    """An array that is filled, part by part, from the device on which the parts are made.

    A part from a CUDA device comes while the next one is made.

    Attributes:
        array: what is filled; another part may still be on its way until :meth:`all`.
    """

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self._coming: tuple[Any, torch.Tensor, torch.cuda.Event] | None = None

    def put(self, place: Any, part: torch.Tensor) -> None:
        """``array[place] = part``, sooner or later."""
        if part.device.type != "cuda":
            self.array[place] = part.numpy(force=True)
            return
        arriving = torch.empty(part.shape, dtype=part.dtype, pin_memory=True)
        arriving.copy_(part, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(part.device))
        self.all()
        self._coming = place, arriving, copied

    def all(self) -> np.ndarray:
        """The array with all parts in their places."""
        if self._coming is not None:
            place, arriving, copied = self._coming
            copied.synchronize()
            self.array[place] = arriving.numpy()
            self._coming = None
        return self.array


def device_name(device: torch.device) -> str:
    """The device with its product name where PyTorch knows it, for reports."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)

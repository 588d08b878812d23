"""From the name of a device, as users of several tools spell it, to a torch device that is there."""

from __future__ import annotations

import re

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


def device_name(device: torch.device) -> str:
    """The device with its product name where PyTorch knows it, for reports."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)

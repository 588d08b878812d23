"""A network's weights into a file that says what it holds."""

from __future__ import annotations

import json
import os
from pathlib import Path

import safetensors.torch
import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from medseg3d.checkpoints.files import FORMAT, RECORD
from medseg3d.checkpoints.merging import order_of
from medseg3d.io.atomic import write_atomic
from medseg3d.version import __version__

SUFFIXES = (".pt", ".pth", ".safetensors")


def bare(network: nn.Module) -> nn.Module:
    """The network without what DataParallel, DistributedDataParallel and torch.compile put around it."""
    while True:
        if isinstance(network, DataParallel | DistributedDataParallel):
            network = network.module
        elif isinstance(compiled := getattr(network, "_orig_mod", None), nn.Module):
            network = compiled
        else:
            return network


def save_checkpoint(network: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Save the weights of a network so that `load_checkpoint` restores them exactly; the file is whole or absent.

    The file holds tensors under the keys of the bare network, without those of DistributedDataParallel and
    torch.compile, and beside them the class name, the version of medseg3d and the order of patch merging. The suffix
    says how: ".safetensors", or ".pt" for a dictionary with the entry "state_dict", which MONAI reads as well.

    Args:
        network: the network, on any device.
        path: the file; missing folders are made, an older file is replaced.

    Returns:
        The path.

    Raises:
        ValueError: another suffix, or a network without weights or on the device "meta".
        OSError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"weights are saved as {', '.join(SUFFIXES)}, got {path.name}")
    network = bare(network)
    state = network.state_dict()
    if not state or any(tensor.is_meta for tensor in state.values()):
        raise ValueError(f"this {type(network).__name__} has no weights to save")
    # Copies: a view would be saved with all that it is a view of, and safetensors takes no shared memory.
    tensors = {
        key.replace("_orig_mod.", ""): tensor.detach().to("cpu", memory_format=torch.contiguous_format, copy=True)
        for key, tensor in state.items()
    }
    record: dict[str, str | int] = {"format": FORMAT, "version": __version__, "network": type(network).__name__}
    if (order := order_of(network)) is not None:
        record["merging_order"] = order

    def write(temporary: Path) -> None:
        if path.suffix == ".safetensors":
            metadata = {"format": "pt", RECORD: json.dumps(record)}  # "pt" is what its readers expect
            safetensors.torch.save_file(tensors, temporary, metadata=metadata)
        else:
            torch.save({"state_dict": tensors, RECORD: record}, temporary)

    return write_atomic(path, write)

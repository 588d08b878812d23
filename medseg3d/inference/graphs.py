"""A network's kernels on a CUDA device, recorded once for a size of window and then started all together.

A Swin UNETR starts about 550 kernels a window, and starting them one by one takes longer than most of them run. A CUDA
graph (NVIDIA, "CUDA C++ Programming Guide", section CUDA graphs) starts them as one. It repeats addresses, not Python:
the same input and output memory each time, and what a network decides by the values it sees is decided once. So a
recording is compared with the network before it is used, and where anything goes wrong the network runs as it is.

Shape legend: window_BC... are (windows, channels, *spatial axes).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)

# To record and compare takes the time of five batches or so.
WORTH_FROM = 16
# The network runs as it is before it is recorded, so that libraries have chosen how and layers hold what they keep.
AFTER = 3
WARM_UPS = 2
# Each holds the memory of a whole forward pass.
MAX_RECORDINGS = 2
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}

Key = tuple[torch.Size, torch.dtype, torch.device]


class Replayed:
    """A network that is replayed from a recording wherever that is possible and gives the same.

    What it returns may lie in memory that the next call writes into: **use it up, or copy it, before the next call**,
    on the same stream. Make one for each image and forget it then: recordings hold the addresses of the weights, which
    must neither move nor change meanwhile.

    Args:
        network: anything callable that returns one tensor. It runs as it is on what comes with further arguments, while
            gradients are recorded and within autocast, whose cache would not outlive the recording.
        calls: how many are to come; with fewer than ``WORTH_FROM`` nothing is recorded.
        made_of: the network that this one was made of, by which :func:`can_record` decides; itself by default.
        record: called with the network and a window, returns what stands for the network on windows of that shape.
        device_type: of the windows that are recorded.

    Attributes:
        failure: why recordings were given up, in words; empty as long as they were not.
    """

    def __init__(
        self,
        network: Callable,
        calls: int,
        made_of: Callable | None = None,
        record: Callable[[Callable, torch.Tensor], Callable] | None = None,
        device_type: str = "cuda",
    ) -> None:
        self.network = network
        self.record = CudaRecording if record is None else record
        self.device_type = device_type
        self.failure = ""
        self._wanted = calls >= WORTH_FROM and can_record(network if made_of is None else made_of)
        self._seen: Counter[Key] = Counter()
        self._recordings: dict[Key, Callable] = {}

    def __call__(self, window_BC: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not self._may_record(window_BC):
            return self.network(window_BC, *args, **kwargs)
        key = (window_BC.shape, window_BC.dtype, window_BC.device)
        if key in self._recordings:
            return self._recordings[key](window_BC)
        self._seen[key] += 1
        if self._seen[key] != AFTER or len(self._recordings) >= MAX_RECORDINGS:
            return self.network(window_BC)
        given = window_BC.clone()  # the network may write into what it gets
        output = self.network(window_BC)
        if isinstance(output, torch.Tensor):
            self._try(key, given, output)
        return output

    def _may_record(self, window_BC: torch.Tensor) -> bool:
        if not self._wanted or self.failure or window_BC.device.type != self.device_type:
            return False
        return not (torch.is_grad_enabled() or torch.is_autocast_enabled(self.device_type))

    def _try(self, key: Key, window_BC: torch.Tensor, expected: torch.Tensor) -> None:
        """Record and compare with ``expected``, what the network makes of ``window_BC``."""
        try:
            # Recorded on another window: what was not recorded cannot look right by standing there already.
            recording = self.record(self.network, window_BC.flip(-1))
            found = recording(window_BC)
            difference = "" if agree(found, expected) else "its first replay differs from the network"
        except Exception as error:  # of the driver, a library, or the network's own; the network itself has just run
            difference = f"it cannot be recorded: {str(error).strip().partition(chr(10))[0] or type(error).__name__}"
        if difference:
            self.failure = difference
            self._recordings.clear()
            logger.warning("the network runs without a CUDA graph: %s", difference)
        else:
            self._recordings[key] = recording
            logger.debug("CUDA graph recorded for windows of %s, %s", tuple(key[0]), key[1])


class CudaRecording:
    """A network recorded as a CUDA graph, with memory of its own for input, output and all between.

    Args:
        network: returns one tensor. What it starts must depend on the shape of its input only.
        window_BC: on a CUDA device.

    Raises:
        RuntimeError: the network does what cannot be recorded, such as to wait for a value, or memory runs out.
    """

    def __init__(self, network: Callable, window_BC: torch.Tensor) -> None:
        device = window_BC.device
        self.input = window_BC.clone()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            current, side = torch.cuda.current_stream(), torch.cuda.Stream()
            try:
                side.wait_stream(current)
                with torch.cuda.stream(side):  # libraries hold workspaces for each stream
                    for _ in range(WARM_UPS):
                        network(self.input)
                        self.input.copy_(window_BC)
                torch.cuda.synchronize()
                # Other threads read and write scans meanwhile: what they ask of the driver must not end the recording.
                with torch.cuda.graph(self.graph, stream=side, capture_error_mode="thread_local"):
                    self.output = network(self.input)
            finally:
                torch.cuda.set_stream(current)  # a recording that fails leaves its own stream behind
            current.wait_stream(side)

    def __call__(self, window_BC: torch.Tensor) -> torch.Tensor:
        """The network's output, in memory that the next call writes into."""
        self.input.copy_(window_BC)
        self.graph.replay()
        return self.output


def can_record(network: Callable) -> bool:
    """Whether nothing is known against recording: a module in evaluation mode on one device, eager and without hooks.

    A function of one's own may do more than compute, so it is never recorded, nor is what a module wraps of that kind.
    """
    if not isinstance(network, nn.Module):
        return False
    for module in network.modules():
        spread = isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel)
        foreign = isinstance(module, torch.jit.ScriptModule) or hasattr(module, "_orig_mod")
        if module.training or spread or foreign or module._forward_hooks or module._forward_pre_hooks:
            return False
        if not all(isinstance(inner, nn.Module) for inner in _wrapped(module)):
            return False
    return len({tensor.device for tensor in (*network.parameters(), *network.buffers())}) <= 1


def _wrapped(module: nn.Module) -> Iterator[Any]:
    """The networks within one that stands for them, as mirror images, ensembles and casts are."""
    if hasattr(module, "network"):
        yield module.network
    yield from getattr(module, "networks", ())


def agree(found: Any, expected: torch.Tensor) -> bool:
    """Whether two outputs are finite and the same but for rounding, judged by the norm of their difference."""
    if not isinstance(found, torch.Tensor) or (found.shape, found.dtype) != (expected.shape, expected.dtype):
        return False
    if not expected.is_floating_point():
        return torch.equal(found, expected)
    difference, norm = (found.float() - expected.float()).norm(), expected.float().norm()
    return bool(norm.isfinite() & (difference <= TOLERANCE.get(expected.dtype, 1e-4) * norm))

"""How windows reach a network: as many at once as memory has room for, and on a GPU while it still computes.

Shape legend: images_BC... and window_BC... are (images or windows, channels, *spatial axes).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from medseg3d.errors import is_out_of_memory
from medseg3d.inference.windows import Window

logger = logging.getLogger(__name__)

T = TypeVar("T")
Place = tuple[int, Window]  # an image's number, and a window of it


class Feed:
    """Windows of images, some at a time, on the device where a network runs.

    Where the images are there already, windows are cut out of them there. From the memory of the CPU to a CUDA device
    the next windows are gathered and copied while the network still computes; **their memory is used again for those
    after the next**, so a network must not keep what it gets.

    Where memory runs out, half as many windows go through the network at once from then on.

    Args:
        images_BC: not changed.
        device: where the network runs.
        at_once: windows that go through the network at once.
        cuda: streams and events.
    """

    def __init__(self, images_BC: torch.Tensor, device: torch.device, at_once: int, cuda: Any = torch.cuda) -> None:
        self.at_once = at_once
        self.device = device
        crosses = images_BC.device.type == "cpu" and device.type == "cuda"
        self._source = _Prefetched(images_BC, device, at_once, cuda) if crosses else _Cut(images_BC, device)

    def run(
        self, places: Sequence[Place], call: Callable[[torch.Tensor, Sequence[Place]], T], then: Sequence[Place] = ()
    ) -> Iterator[tuple[Sequence[Place], torch.Tensor, T]]:
        """Places, their windows, and what ``call(windows, places)`` gives, which is to be used up before the next.

        Args:
            places: of windows of one size.
            call: runs the network; once more for each half where memory ran out.
            then: places that follow these, in another call of this method.

        Raises:
            RuntimeError, MemoryError: memory runs out with a single window.
        """
        first = 0
        while first < len(places):
            group = places[first : first + self.at_once]
            windows_BC = self._source.take(group)
            failure = ""
            try:
                outputs = call(windows_BC, group)
            except (RuntimeError, MemoryError) as error:
                if len(group) == 1 or not is_out_of_memory(error):
                    raise
                failure = str(error).partition("\n")[0]
            if failure:  # out here nothing holds what the network had made
                del windows_BC
                self._source.used()
                self._halve(len(group), failure)
                continue
            first += len(group)
            yield group, windows_BC, outputs
            del windows_BC, outputs
            self._source.used()
            self._source.expect(places[first : first + self.at_once] or then[: self.at_once])

    def _halve(self, tried: int, failure: str) -> None:
        self.at_once = max(1, tried // 2)
        logger.warning("memory ran out with %d windows at once, now %d: %s", tried, self.at_once, failure)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def device_of(network: Callable, otherwise: torch.device) -> torch.device:
    """Where a network's parameters are, or those of the network within it; ``otherwise`` if that cannot be known."""
    inner: Any = network
    while not isinstance(inner, nn.Module):
        inner = getattr(inner, "network", None) or next(iter(getattr(inner, "networks", ())), None)
        if inner is None:
            return otherwise
    return next((parameter.device for parameter in inner.parameters()), otherwise)


class _Cut:
    """Windows as copies, made where the images are."""

    def __init__(self, images_BC: torch.Tensor, device: torch.device) -> None:
        self.images_BC, self.device = images_BC, device

    def expect(self, group: Sequence[Place]) -> None:
        pass

    def take(self, group: Sequence[Place]) -> torch.Tensor:
        return torch.cat([_window(self.images_BC, place) for place in group]).to(self.device)

    def used(self) -> None:
        pass


class _Slot:
    """Page-locked memory of the CPU and as much of the device, for one batch of windows."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, cuda: Any) -> None:
        self.gathered = torch.empty(tuple(shape), dtype=dtype, pin_memory=device.type == "cuda")
        self.arrived = torch.empty(tuple(shape), dtype=dtype, device=device)
        self.copied, self.used = cuda.Event(), cuda.Event()


class _Prefetched:
    """Windows gathered on the CPU and copied to a CUDA device on a stream of its own, in two slots by turns."""

    def __init__(self, images_BC: torch.Tensor, device: torch.device, at_once: int, cuda: Any) -> None:
        self.images_BC, self.device, self.at_once, self.cuda = images_BC, device, at_once, cuda
        self.stream = cuda.Stream(device)
        self.slots: list[_Slot] = []
        self.turn = 0
        self.expected: Sequence[Place] = ()

    def expect(self, group: Sequence[Place]) -> None:
        """Bring the windows of ``group`` on their way; they are the next to be taken."""
        self.expected = group
        if not group:
            return
        if not self.slots:
            self.slots = [self._slot(_window(self.images_BC, group[0])) for _ in range(2)]
        self.turn = 1 - self.turn
        slot = self.slots[self.turn]
        slot.copied.synchronize()  # the copy before has left the memory that is written now
        for row, place in zip(slot.gathered, group, strict=False):
            row.copy_(_window(self.images_BC, place)[0])
        with self.cuda.stream(self.stream):
            self.stream.wait_event(slot.used)  # the network has read what the copy writes over
            slot.arrived[: len(group)].copy_(slot.gathered[: len(group)], non_blocking=True)
            slot.copied.record(self.stream)

    def take(self, group: Sequence[Place]) -> torch.Tensor:
        if not self.expected or list(group) != list(self.expected):
            self.expect(group)
        self.expected = ()
        slot = self.slots[self.turn]
        self.cuda.current_stream(self.device).wait_event(slot.copied)
        return slot.arrived[: len(group)]

    def used(self) -> None:
        """All that reads the windows taken last has been started."""
        self.slots[self.turn].used.record(self.cuda.current_stream(self.device))

    def _slot(self, window_1C: torch.Tensor) -> _Slot:
        slot = _Slot((self.at_once, *window_1C.shape[1:]), window_1C.dtype, self.device, self.cuda)
        if slot.arrived.is_cuda:  # it was made on another stream than it is written on
            slot.arrived.record_stream(self.stream)
            self.stream.wait_stream(self.cuda.current_stream(self.device))
        return slot


def _window(images_BC: torch.Tensor, place: Place) -> torch.Tensor:
    number, window = place
    return images_BC[(slice(number, number + 1), slice(None), *window)]

"""Windows on their way to a network: memory that runs out, memory that is used again, and what waits for what."""

from __future__ import annotations

import logging
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from medseg3d.inference import SubVolumes
from medseg3d.inference.augmentation import Flips
from medseg3d.inference.ensemble import Ensemble
from medseg3d.inference.feeding import Feed, _Prefetched, device_of
from medseg3d.inference.precision import in_precision
from medseg3d.inference.windows import windows

CPU = torch.device("cpu")


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def some_places(images, roi=4):
    found = [list(windows(images.shape[2:], [roi] * (images.dim() - 2), [0.5] * 3))]
    return [(b, window) for b in range(len(images)) for window in found[0]]


def cut(images, places):
    return torch.stack([images[(b, slice(None), *window)] for b, window in places])


# Memory that runs out


class Small(nn.Module):
    """A network on a device that has memory for so many windows at once."""

    def __init__(self, room, error=torch.OutOfMemoryError):
        super().__init__()
        self.convolution = nn.Conv3d(1, 3, 3, padding=1)
        self.room, self.error, self.batches = room, error, []

    def forward(self, window):
        self.batches.append(len(window))
        if len(window) > self.room:
            raise self.error("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
        return self.convolution(window)


@pytest.mark.parametrize("blended", [True, False])
@pytest.mark.parametrize(("room", "batches"), [(8, [8]), (7, [8, 4]), (3, [8, 4, 2]), (1, [8, 4, 2, 1])])
@torch.no_grad()
def test_half_as_many_windows_go_on_where_memory_runs_out(room, batches, blended, caplog):
    torch.manual_seed(0)
    network = Small(room).eval()
    image = noise(1, 1, 20, 14, 14)
    run = SubVolumes.__call__ if blended else SubVolumes.label_map
    expected = run(SubVolumes(8, 0.5, batch_size=1), image, network.convolution)
    network.batches.clear()
    seen = []
    with caplog.at_level(logging.WARNING):
        found = run(SubVolumes(8, 0.5, batch_size=8, progress=lambda *step: seen.append(step)), image, network)
    torch.testing.assert_close(found, expected)
    tried = [count for count in network.batches if count in batches]
    assert tried[: len(batches)] == batches and max(tried[len(batches) :], default=0) <= batches[-1]
    assert len(caplog.records) == len(batches) - 1
    assert all("memory ran out with" in record.message and "\n" not in record.message for record in caplog.records)
    done = [step for step, _ in seen]
    assert done == sorted(set(done)) and done[-1] == seen[-1][1], "progress counts each window once"


@torch.no_grad()
def test_a_window_that_does_not_fit_by_itself_is_an_error():
    with pytest.raises(torch.OutOfMemoryError):
        SubVolumes(8, batch_size=4).label_map(noise(1, 1, 16, 16, 16), Small(0).eval())


@torch.no_grad()
def test_other_errors_of_a_network_are_not_taken_for_it():
    network = Small(1, lambda text: RuntimeError("shapes do not match")).eval()
    with pytest.raises(RuntimeError, match="shapes"):
        SubVolumes(8, batch_size=4).label_map(noise(1, 1, 16, 16, 16), network)
    assert network.batches[-1] == 4


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
        MemoryError("Unable to allocate 7 GiB"),
    ],
)
@torch.no_grad()
def test_a_batch_is_halved_however_a_library_says_that_memory_ran_out(error):
    network = Small(2, lambda text: error).eval()
    SubVolumes(8, batch_size=4).label_map(noise(1, 1, 16, 16, 16), network)
    assert max(network.batches[network.batches.index(4) + 1 :]) == 2


def test_nothing_of_the_failed_batch_is_held_when_the_halves_run():
    import weakref

    held = []

    def call(batch, group):
        assert all(reference() is None for reference in held)
        made = batch * 2
        if len(group) > 1:
            held.append(weakref.ref(made))
            raise torch.OutOfMemoryError("full")
        return made

    images = noise(1, 1, 8, 8, 8)
    places = some_places(images)
    results = [outputs.clone() for _, _, outputs in Feed(images, CPU, 4).run(places, call)]
    assert torch.equal(torch.cat(results), 2 * cut(images, places)) and len(held) == 2


# What waits for what


class FakeCuda:
    """Streams that run nothing until somebody waits: a copy that is not waited for has not happened."""

    def __init__(self):
        self.main = self.Stream()
        self.now = self.main

    class Event:
        def __init__(self):
            self.stream, self.position = None, 0

        def record(self, stream):
            self.stream, self.position = stream, len(stream.work)

        def synchronize(self):
            if self.stream is not None:
                self.stream.run_to(self.position)

    class Stream:
        def __init__(self, device=None):
            self.work, self.finished = [], 0

        def run_to(self, position):
            while self.finished < position:
                self.finished += 1
                self.work[self.finished - 1]()

        def wait_event(self, event):
            stream, position = event.stream, event.position  # as recorded now, whatever is recorded later
            if stream is not None:
                self.work.append(lambda: stream.run_to(position))

    @contextmanager
    def stream(self, stream):
        before, self.now = self.now, stream
        try:
            yield
        finally:
            self.now = before

    def current_stream(self, device=None):
        return self.now

    def do(self, work):
        self.now.work.append(work)


@pytest.fixture
def fake(monkeypatch):
    """Copies marked non_blocking happen on the stream they were started on, when that one gets there."""
    cuda, copy = FakeCuda(), torch.Tensor.copy_

    def copy_(self, other, non_blocking=False):
        if non_blocking:
            cuda.do(lambda: copy(self, other))
            return self
        return copy(self, other)

    monkeypatch.setattr(torch.Tensor, "copy_", copy_)
    return cuda


def prefetching(images, at_once, cuda):
    feed = Feed(images, CPU, at_once, cuda)
    feed._source = _Prefetched(images, CPU, at_once, cuda)
    return feed


def computed(cuda, images, at_once, calls, room=10**6):
    """What a network that computes when its stream gets there has read, over several calls of ``run``."""
    read = []

    def call(batch, group):
        if len(group) > room:
            raise torch.OutOfMemoryError("full")
        cuda.do(lambda: read.append(batch.clone()))

    feed = prefetching(images, at_once, cuda)
    groups = []
    for number, places in enumerate(calls):
        following = calls[number + 1] if number + 1 < len(calls) else []
        groups += [group for group, _, _ in feed.run(places, call, following)]
    cuda.main.run_to(len(cuda.main.work))
    assert [place for group in groups for place in group] == [place for places in calls for place in places]
    return torch.cat(read)


@pytest.mark.parametrize("at_once", [1, 2, 3, 50])
def test_each_window_arrives_before_it_is_read_and_stays_until_then(at_once, fake):
    images = noise(2, 1, 8, 6, 4)
    places = some_places(images)
    assert torch.equal(computed(fake, images, at_once, [places]), cut(images, places))


def test_the_next_windows_are_on_their_way_while_the_network_computes(fake):
    images = noise(1, 1, 10, 4, 4)
    places = some_places(images)
    feed = prefetching(images, 1, fake)
    waiting = []
    for _ in feed.run(places[:3], lambda batch, group: waiting.append(feed._source.expected), places[3:]):
        pass
    assert waiting == [(), (), ()], "each was taken before the network ran on it"
    assert feed._source.expected == places[3:4], "of the next call, on its way already"
    assert list(feed.run(places[3:4], lambda batch, group: batch)) and not feed._source.expected


def test_several_runs_and_memory_that_runs_out_are_no_matter(fake):
    images = noise(1, 1, 16, 6, 6)
    places = some_places(images)
    calls = [places[:10], places[10:13], places[13:]]
    assert torch.equal(computed(fake, images, 4, calls), cut(images, places))
    assert torch.equal(computed(fake, images, 4, calls, room=2), cut(images, places))


@pytest.mark.parametrize("broken", ["wait_for_copy", "wait_for_reading", "reuse_of_gathered"])
def test_the_test_would_see_a_missing_wait(broken, fake, monkeypatch):
    images = noise(1, 1, 30, 4, 4)
    places = some_places(images)
    if broken == "wait_for_copy":
        monkeypatch.setattr(fake.main, "wait_event", lambda event: None)
    elif broken == "wait_for_reading":
        monkeypatch.setattr(_Prefetched, "used", lambda self: None)
    else:
        monkeypatch.setattr(fake.Event, "synchronize", lambda self: None)
    assert not torch.equal(computed(fake, images, 1, [places]), cut(images, places))


# Where a network is


def test_the_device_of_a_network():
    network = nn.Conv3d(1, 1, 1, device="meta")
    meta = torch.device("meta")
    for one in (network, Flips(network, (0,)), in_precision(network, torch.bfloat16), Ensemble([network, network])):
        assert device_of(one, CPU) == meta
    assert device_of(lambda window: window, CPU) == CPU
    assert device_of(nn.Identity(), meta) == meta


def test_windows_go_to_the_network():
    """An image and a network on devices of different kinds; "meta" stands for the GPU."""
    image = noise(1, 1, 12, 8, 8)
    seen = []

    class Remote(nn.Conv3d):
        def forward(self, window):
            seen.append(window.device.type)
            return torch.zeros(window.shape)

    strategy = SubVolumes(8, 0.5, device="cpu")
    network = Remote(1, 1, 1, device="meta").eval()
    for _ in strategy.slabs(image, network):
        pass
    assert set(seen) == {"meta"}


# On a device


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
def test_prefetched_windows_give_the_labels_of_an_image_on_the_device():
    torch.manual_seed(0)
    image, network = noise(1, 1, 96, 64, 64), nn.Conv3d(1, 9, 3, padding=1).eval().cuda()
    strategy = SubVolumes(32, 0.5, batch_size=3)
    expected = strategy.label_map(image.cuda(), network)
    for _ in range(3):
        found = strategy.label_map(image, network)
        assert found.is_cuda and torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("on_cpu", [True, False])
@torch.no_grad()
def test_nothing_waits_for_the_device_between_windows(on_cpu):
    image, network = noise(1, 1, 96, 64, 64), nn.Conv3d(1, 9, 3, padding=1).eval().cuda()
    strategy = SubVolumes(32, 0.5, batch_size=2, graph=False)
    slabs = strategy.slabs(image if on_cpu else image.cuda(), network)
    next(slabs)  # the head is tried, weights go there
    torch.cuda.set_sync_debug_mode("error")
    try:
        for slab in slabs:
            assert slab.values.is_cuda
    finally:
        torch.cuda.set_sync_debug_mode("default")

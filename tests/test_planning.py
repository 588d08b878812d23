"""Plans: what is given up in which order, what they say of memory, and that they change nothing."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from medseg3d import planning
from medseg3d.errors import in_words, is_out_of_memory
from medseg3d.inference import Downsampled, Slices, SubVolumes
from medseg3d.planning import (
    GIB,
    OverMemoryLimit,
    Plan,
    Room,
    make_plan,
    windows_in,
)
from medseg3d.trial import WindowCost

IMAGE = torch.zeros(1, 1, 40, 24, 24)
HELD = 1000  # bytes, by the process


@pytest.fixture
def costs(monkeypatch):
    """Windows cost 100 bytes each and one second, two classes are blended; nothing is measured."""
    asked = []

    def measure(strategy, image, network):
        batch = getattr(strategy, "batch_size", 1)
        asked.append(batch)
        return WindowCost(seconds=float(batch), labelling=0.0, ram=100 * batch, vram=10 * batch, channels=2)

    monkeypatch.setattr(planning, "measure_window", measure)
    monkeypatch.setattr(planning, "current_memory", lambda: HELD)
    return asked


def plan(strategy=None, order=1, image=IMAGE, target=None, **limits):
    strategy = SubVolumes(16, 0.5, batch_size=4) if strategy is None else strategy
    return make_plan(strategy, order, image, image.shape[2:] if target is None else target, nn.Identity(), **limits)


# What is given up


STEPS = (
    "one window at a time",
    "sums of windows in bfloat16",
    "nearest labels instead of interpolated logits",
)


def test_nothing_is_given_up_without_need(costs):
    own = SubVolumes(16, 0.5, batch_size=4)
    for limits in ({}, {"max_ram": 10**12, "max_vram": 10**12}, {"max_ram": plan(own).ram, "max_vram": 40}):
        found = plan(own, **limits)
        assert found.steps == () and found.strategy is own and found.order == 1


def test_steps_of_the_ladder_come_one_after_another(costs):
    """Each limit one byte below what the plan before it takes."""
    found, seen = plan(), []
    with pytest.raises(OverMemoryLimit):
        for _ in range(10):
            found = plan(max_ram=found.ram - 1)
            seen.append(found)
    assert [one.steps for one in seen] == [STEPS[:1], STEPS[:2], STEPS]
    batches, sums, orders = zip(*((p.strategy.batch_size, p.strategy.accumulate, p.order) for p in seen), strict=True)
    assert batches == (1, 1, 1) and orders == (1, 1, 0)
    assert sums == (torch.float32, torch.bfloat16, torch.bfloat16)
    assert [one.strategy.overlap for one in seen] == [0.5] * 3, "what windows there are stays as it is"
    assert len({one.windows for one in seen}) == 1


@pytest.mark.parametrize(
    ("strategy", "order", "steps"),
    [
        (SubVolumes(16), 1, STEPS[1:]),
        (SubVolumes(16, accumulate=torch.bfloat16), 1, STEPS[2:]),
        (SubVolumes(16, accumulate=torch.bfloat16), 0, ()),
        (Downsampled((8, 8, 8)), 1, STEPS[2:]),
        (Slices(), 0, ()),
    ],
)
def test_only_what_there_is_can_be_given_up(strategy, order, steps):
    rungs = list(planning._ladder(strategy, order, torch.device("cpu")))
    assert tuple(step for *_, step in rungs) == steps


def test_windows_leave_an_accelerator_before_their_sums_lose_precision():
    rungs = list(planning._ladder(SubVolumes(16, batch_size=2), 1, torch.device("cuda")))
    steps = [step for *_, step in rungs]
    graph, blending = "no CUDA graph of the network", "windows are blended in the memory of the CPU"
    assert steps == [STEPS[0], graph, blending, *STEPS[1:]]
    assert [str(strategy.device) for strategy, *_ in rungs] == ["None", "None", "cpu", "cpu", "cpu"]
    assert [strategy.graph for strategy, *_ in rungs] == [True, False, False, False, False]
    given = SubVolumes(16, device="cpu", graph=False)
    assert [step for *_, step in planning._ladder(given, 0, torch.device("cuda"))] == [STEPS[1]]


def test_each_batch_size_is_measured_once(costs):
    with pytest.raises(OverMemoryLimit):
        plan(max_ram=1)
    assert costs == [4, 1]


def test_a_limit_that_cannot_be_kept(costs):
    with pytest.raises(OverMemoryLimit) as caught:
        plan(max_ram=GIB // 10**6, max_vram=5)
    text = in_words(caught.value)
    assert text.startswith("the scan needs about ") and text.endswith(": crop it, or allow more")
    assert "of memory" in text and "on the device" in text and f"even with {', '.join(STEPS)}" in text
    assert is_out_of_memory(caught.value)
    with pytest.raises(OverMemoryLimit) as caught:
        plan(SubVolumes(16, accumulate=torch.bfloat16), 0, max_ram=1)
    assert "even with" not in str(caught.value) and "on the device" not in str(caught.value)


@pytest.mark.parametrize(
    ("ram", "vram", "fits"),
    [
        (None, None, True),
        (10, None, True),
        (9, None, False),
        (None, 5, True),
        (None, 4, False),
        (10, 5, True),
        (9, 9, False),
    ],
)
def test_fits(ram, vram, fits):
    assert Plan(SubVolumes(16), 1, windows=1, seconds=1.0, ram=10, vram=5).fits(ram, vram) is fits


def test_a_plan_in_words():
    text = str(Plan(SubVolumes(16), 0, 7, 12.4, 3 * GIB, 0, STEPS[:2]))
    assert text.splitlines() == [
        "strategy: SubVolumes, 7 windows",
        "labels onto the scan's grid: nearest",
        "time: about 12 s",
        "memory: about 3.00 GiB",
        f"given up: {STEPS[0]}",
        f"given up: {STEPS[1]}",
    ]
    assert "memory of the device: about 1.50 GiB" in str(Plan(SubVolumes(16), 1, 7, 12.4, GIB, GIB * 3 // 2))


# How it grows


def test_a_longer_scan_takes_one_byte_a_voxel_more(costs):
    """The slab rolls along the long axis and stays as it is; only the label map grows."""
    short, long = (plan(image=torch.zeros(1, 1, size, 24, 24)) for size in (40, 400))
    assert long.ram - short.ram == 360 * 24 * 24
    assert long.windows > 8 * short.windows and long.seconds == long.windows


def test_a_finer_scan_takes_its_label_map_only(costs):
    coarse, fine = plan(), plan(target=(80, 48, 48))
    assert fine.ram - coarse.ram == (2**3 - 1) * 40 * 24 * 24
    assert (fine.windows, fine.seconds) == (coarse.windows, coarse.seconds)


def test_more_classes_cost_sums_of_a_slab(costs, monkeypatch):
    few = plan(order=0)
    monkeypatch.setattr(planning, "measure_window", lambda *_: WindowCost(4.0, 0.0, 400, 40, channels=12))
    assert plan(order=0).ram - few.ram == 10 * 4 * (16 * 24 * 24)


@pytest.mark.parametrize("images", [1, 3])
def test_what_is_held_already_counts(images, costs, monkeypatch):
    before = plan().ram
    monkeypatch.setattr(planning, "current_memory", lambda: images * HELD)
    assert plan().ram - before == (images - 1) * HELD


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (lambda batch: (batch, batch), "needs one tensor of logits, but the network returns a tuple"),
        (nn.ModuleDict({"coarse": nn.Identity(), "fine": nn.Identity()}), "the bundle has several"),
    ],
)
def test_what_cannot_be_planned(network, reason):
    with pytest.raises(ValueError, match=reason):
        make_plan(SubVolumes(16), 1, IMAGE, (40, 24, 24), network)


# Room on a device


@pytest.mark.parametrize(("room", "fit"), [(0, 1), (99, 1), (125, 1), (250, 2), (499, 3), (500, 4), (10**9, 4)])
def test_as_many_windows_at_once_as_fit_into_four_fifths_of_the_room(room, fit):
    assert windows_in(room, one=100, most=4) == fit


@pytest.fixture
def cuda(monkeypatch):
    """A CUDA device of 1000 bytes, 200 of them used, of which nothing more is asked than how full it is."""
    state = SimpleNamespace(free=700, used=200, reserved=300)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (state.free, 1000))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: state.used)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: state.reserved)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return state


def test_a_small_image_goes_to_the_device_and_a_large_one_stays(cuda):
    device = torch.device("cuda:0")

    class Image:
        def __init__(self, nbytes):
            self.nbytes = nbytes

        def to(self, where):
            return where

    strategy = SubVolumes(16)
    fits, large = Image(200), Image(201)  # a quarter of 800
    assert Room(device).place(fits, strategy) == device
    assert Room(device).place(large, strategy) is large
    assert Room(device).place(large, Slices()) == Room(device).place(large, None) == device, "only windows travel"
    assert Room(torch.device("cpu")).place(large, strategy) == torch.device("cpu")
    assert Room(device, max_vram=400).place(Image(51), strategy).nbytes == 51
    assert Room(device, max_vram=400).place(Image(50), strategy) == device


def on_cuda(monkeypatch, vram):
    monkeypatch.setattr(planning, "device_of", lambda network, otherwise: torch.device("cuda:0"))
    tried = []

    def measure(strategy, image, network):
        tried.append(strategy.batch_size)
        return WindowCost(1.0, 0.0, 0, vram * strategy.batch_size, channels=2)

    monkeypatch.setattr(planning, "measure_window", measure)
    return tried


@pytest.mark.parametrize(
    ("vram", "own", "graph", "max_vram", "expected"),
    [
        (1, 1, False, None, 4),
        (1, 7, False, None, 7),
        (100, 1, False, None, 4),
        (200, 1, False, None, 2),
        (100, 1, True, None, 2),
        (100, 1, False, 400, 1),
        (10**6, 4, False, None, 1),
    ],
)
def test_windows_at_once_on_a_device_follow_its_room(vram, own, graph, max_vram, expected, cuda, monkeypatch):
    tried = on_cuda(monkeypatch, vram)
    cuda.free = 500  # with 100 that PyTorch keeps, room for 600
    strategy = SubVolumes(16, 0.5, batch_size=own, device="cpu", graph=graph)
    assert planning.with_room(strategy, IMAGE, nn.Identity(), max_vram).batch_size == expected
    assert tried == [1]


def test_room_is_found_once_for_all_scans_unless_they_are_planned(cuda, monkeypatch):
    tried = on_cuda(monkeypatch, vram=200)
    cuda.free = 500
    strategy, device = SubVolumes(16, 0.5, device="cpu", graph=False), torch.device("cuda:0")
    seen, room = [], Room(device)
    for _ in range(3):
        room.run(lambda strategy, image: seen.append(strategy.batch_size), strategy, IMAGE, nn.Identity(), [])
    assert seen == [2, 2, 2] and tried == [1]
    planned = Room(device, planned=True)
    planned.run(lambda strategy, image: seen.append(strategy.batch_size), strategy, IMAGE, nn.Identity(), [])
    assert seen[-1] == 1 and tried == [1]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory.\nmore"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED\nmore"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried\nmore"),
    ],
)
def test_a_scan_is_not_lost_where_the_device_is_full(error):
    tried, warnings = [], []

    def make(strategy, image):
        tried.append((strategy.batch_size, str(strategy.device), strategy.graph))
        if str(strategy.device) != "cpu":
            raise error
        return "labels"

    room = Room(torch.device("cpu"))
    assert room.run(make, SubVolumes(16, batch_size=3), IMAGE, nn.Identity(), warnings) == "labels"
    assert tried == [(3, "None", True), (1, "cpu", False)]
    assert len(warnings) == 1 and warnings[0].endswith(f"blended on the CPU: {str(error)[:-5]}")
    with pytest.raises(type(error)):
        room.run(lambda strategy, image: make(SubVolumes(16), image), SubVolumes(16), IMAGE, nn.Identity(), [])
    with pytest.raises(type(error)):
        room.run(lambda strategy, image: make(SubVolumes(16), image), Slices(), IMAGE, nn.Identity(), warnings)
    assert len(warnings) == 1


def test_other_errors_are_raised_at_once():
    tried, warnings = [], []

    def make(strategy, image):
        tried.append(strategy.batch_size)
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        Room(torch.device("cpu")).run(make, SubVolumes(16, batch_size=3), IMAGE, nn.Identity(), warnings)
    assert tried == [3] and not warnings


def test_a_plan_for_a_device_counts_what_it_holds_and_gives_up_the_graph(cuda, monkeypatch):
    on_cuda(monkeypatch, vram=100)
    cuda.free = 10**9
    image = torch.zeros(1, 1, 200, 24, 24)
    strategy = SubVolumes(16, 0.5, device="cpu")
    with_graph = plan(strategy, 0, image)
    assert with_graph.strategy.batch_size == planning.AT_ONCE_ON_GPU and with_graph.strategy.graph
    assert with_graph.vram == 200 + 2 * 400
    lean = plan(strategy, 0, image, max_vram=400)
    assert lean.vram == 200 + 2 * 100 and lean.strategy.batch_size == 1 and lean.steps == ()
    without = plan(strategy, 0, image, max_vram=399)
    assert without.vram == 200 + 100 and without.steps == ("no CUDA graph of the network",)
    with pytest.raises(OverMemoryLimit):
        plan(strategy, 0, image, max_vram=299)


def test_windows_over_a_box_are_counted_there(costs):
    image = torch.zeros(1, 1, 100, 24, 24)
    strategy = SubVolumes(16, 0.5, batch_size=1)
    over = plan(strategy.changed(crop=lambda image: (slice(10, 50), slice(0, 24), slice(0, 24))), image=image)
    assert over.windows == plan(strategy, image=image[:, :, :40]).windows < plan(strategy, image=image).windows
    assert over.stages["network"] == over.windows

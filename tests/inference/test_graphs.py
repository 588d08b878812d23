"""When a network is recorded, when it is not, and that a recording which is wrong is never used.

What a CUDA graph does is played by a recorder that, like one, writes into the same memory each time.
"""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from medseg3d.inference import SubVolumes, graphs
from medseg3d.inference.augmentation import Flips
from medseg3d.inference.graphs import AFTER, MAX_RECORDINGS, WORTH_FROM, Replayed, agree, can_record
from medseg3d.inference.precision import in_precision

MANY = 100


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


class Counted(nn.Module):
    """A convolution that counts how often Python runs it."""

    def __init__(self, channels=1, classes=3):
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv3d(channels, classes, 3, padding=1)
        self.runs = 0

    def forward(self, window):
        self.runs += 1
        return self.convolution(window)


class Recorder:
    """Counts recordings; each returns the same tensor at every call."""

    def __init__(self, change=lambda output: output):
        self.recorded, self.replays, self.change = [], 0, change

    def __call__(self, network, window):
        self.recorded.append(tuple(window.shape))
        memory = network(window).clone()

        def replay(other):
            assert other.shape == window.shape
            self.replays += 1
            return memory.copy_(self.change(network.convolution(other)))

        return replay


def replayed(network, recorder, calls=MANY):
    return Replayed(network, calls, None, recorder, "cpu")


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_after_some_calls_the_recording_stands_for_the_network():
    network, recorder = Counted().eval(), Recorder()
    both = replayed(network, recorder)
    outputs = []
    for number in range(10):
        window = noise(2, 1, 6, 6, 6, seed=number)
        before = window.clone()
        output = both(window)
        torch.testing.assert_close(output, network.convolution(window))
        assert torch.equal(window, before)
        outputs.append(output)
    assert recorder.recorded == [(2, 1, 6, 6, 6)] and both.failure == ""
    assert network.runs == AFTER + 1, "as it is, and once for the recorder"
    assert recorder.replays == 10 - AFTER + 1, "one of them was compared"
    assert outputs[-1] is outputs[-2] is not outputs[0], "replays share their output"


def test_each_shape_and_type_has_its_own_recording_up_to_a_limit():
    network, recorder = Counted().eval(), Recorder()
    both = replayed(network, recorder)
    shapes = [(n, 1, 5, 5, 5) for n in (1, 2, 3)]
    for _ in range(AFTER + 2):
        for number, shape in enumerate(shapes):
            window = noise(*shape, seed=number)
            torch.testing.assert_close(both(window), network.convolution(window))
    assert recorder.recorded == shapes[:MAX_RECORDINGS]


@pytest.mark.parametrize("change", [lambda y: y + 1, lambda y: y * float("nan"), lambda y: y.roll(1, 2)])
def test_a_recording_that_differs_is_dropped_and_the_reason_told(change, caplog):
    network, recorder = Counted().eval(), Recorder(change)
    both = replayed(network, recorder)
    with caplog.at_level(logging.WARNING):
        for number in range(8):
            window = noise(1, 1, 6, 6, 6, seed=number)
            torch.testing.assert_close(both(window), network.convolution(window))
    assert "differs" in both.failure and both.failure in caplog.text
    assert len(recorder.recorded) == 1 and recorder.replays == 1, "it is not tried again"


def test_what_stands_in_the_output_from_recording_does_not_pass_for_a_replay():
    """A recording that misses all kernels, as one of a network on several devices would."""

    def record(network, window):
        output = network(window)
        return lambda other: output

    both = replayed(Counted().eval(), record)
    for number in range(AFTER):
        both(noise(1, 1, 6, 6, 6, seed=number))
    assert "differs" in both.failure


@pytest.mark.parametrize("error", [RuntimeError("operation not permitted\nmore"), torch.OutOfMemoryError("full")])
def test_a_recording_that_fails_costs_nothing_but_the_attempt(error, caplog):
    attempts = []

    def record(network, window):
        attempts.append(window)
        raise error

    network = Counted().eval()
    both = replayed(network, record)
    with caplog.at_level(logging.WARNING):
        for number in range(8):
            window = noise(1, 1, 6, 6, 6, seed=number)
            torch.testing.assert_close(both(window), network.convolution(window))
    assert len(attempts) == 1
    assert both.failure == f"it cannot be recorded: {str(error).splitlines()[0]}" and both.failure in caplog.text


def test_the_network_s_own_errors_are_not_swallowed():
    class Broken(Counted):
        def forward(self, window):
            raise KeyError("broken")

    both = replayed(Broken().eval(), Recorder())
    for _ in range(AFTER + 1):
        with pytest.raises(KeyError, match="broken"):
            both(noise(1, 1, 4, 4, 4))


def test_what_is_not_worth_it_or_not_safe_runs_as_it_is():
    window = noise(1, 1, 6, 6, 6)

    def recordings(network=None, calls=MANY, device_type="cpu", **keywords):
        recorder = Recorder()
        both = Replayed(network or Counted().eval(), calls, None, recorder, device_type)
        for _ in range(AFTER + 1):
            both(window, **keywords)
        return len(recorder.recorded)

    assert recordings() == 1
    assert recordings(calls=WORTH_FROM) == 1 and recordings(calls=WORTH_FROM - 1) == 0
    assert recordings(device_type="cuda") == 0, "the windows are on the CPU"
    assert recordings(lambda window: window) == 0
    with torch.enable_grad():
        assert recordings() == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert recordings() == 0

    class Scaled(Counted):
        def forward(self, window, by=1):
            return by * super().forward(window)

    assert recordings(Scaled().eval(), by=2) == 0

    class Several(Counted):
        def forward(self, window):
            return {"logits": super().forward(window)}

    assert recordings(Several().eval()) == 0


def test_a_network_that_writes_into_its_input_is_compared_on_what_it_was_given():
    class Writes(Counted):
        def forward(self, window):
            self.runs += 1
            return self.convolution(window.mul_(2))

    def record(network, window):
        return lambda other: network.convolution(2 * other)

    both = replayed(Writes().eval(), record)
    for number in range(AFTER):
        both(noise(1, 1, 6, 6, 6, seed=number))
    assert both.failure == "" and len(both._recordings) == 1


def test_which_networks_may_be_recorded():
    plain = Counted().eval()
    assert can_record(plain)
    assert can_record(Flips(plain, axes=(0,)))
    assert can_record(in_precision(plain, torch.bfloat16)) and can_record(in_precision(plain, torch.bfloat16, True))
    assert can_record(nn.Sequential(plain, nn.BatchNorm3d(3)).eval())
    assert not can_record(nn.Sequential(plain, nn.BatchNorm3d(3)).train())
    assert not can_record(lambda window: window)
    assert not can_record(Flips(lambda window: window, axes=(0,)))
    assert not can_record(in_precision(lambda window: window, torch.bfloat16))
    assert not can_record(torch.jit.trace(nn.Conv3d(1, 1, 1), torch.zeros(1, 1, 2, 2, 2)).eval())
    assert not can_record(torch.compile(plain))
    assert not can_record(nn.DataParallel(plain).eval())
    spread = Counted().eval()
    spread.elsewhere = nn.Parameter(torch.zeros(1, device="meta"))
    assert not can_record(spread)
    hooked = Counted().eval()
    hooked.convolution.register_forward_hook(lambda *_: None)
    assert not can_record(hooked)


def test_agreement():
    ones = torch.ones(4, 4)
    assert agree(ones + 1e-6, ones) and not agree(ones + 1e-3, ones)
    assert agree(ones.bfloat16() * 1.01, ones.bfloat16()) and not agree(ones.bfloat16() * 1.05, ones.bfloat16())
    assert not agree(ones[:2], ones) and not agree(ones.double(), ones) and not agree((ones,), ones)
    assert not agree(ones * float("nan"), ones * float("nan")) and not agree(ones, ones * float("inf"))
    assert agree(ones.int(), ones.int()) and not agree(ones.int() + 1, ones.int())
    assert agree(0 * ones, 0 * ones) and not agree(ones, 0 * ones)


def test_slabs_use_up_each_output_before_the_next(monkeypatch):
    """All replays write into one tensor; blended labels are those of the network as it is."""
    image, network, recorder = noise(1, 1, 40, 12, 12), Counted().eval(), Recorder()
    monkeypatch.setattr(graphs, "CudaRecording", recorder)
    monkeypatch.setattr(Replayed.__init__, "__defaults__", (None, None, "cpu"))
    strategy = SubVolumes(8, 0.5, batch_size=2)
    expected = SubVolumes(8, 0.5, batch_size=2, graph=False).label_map(image, network)
    assert recorder.recorded == []
    labels = strategy.label_map(image, network)
    assert recorder.replays >= WORTH_FROM
    assert torch.equal(labels, expected)


class FakeGraphs:
    """What a recording asks of torch.cuda, noted down; a graph runs what was run while it was recorded."""

    def __init__(self, monkeypatch, fails=False):
        self.calls, self.stream, self.fails = [], "current", fails
        fake = self

        class Stream:
            def wait_stream(self, other):
                fake.calls.append(f"side waits for {other}")

        class Current(str):
            def wait_stream(self, other):
                fake.calls.append("current waits for side")

        class Within:
            def __init__(self, *arguments, **keywords):
                self.arguments, self.keywords = arguments, keywords

            def __exit__(self, *error):
                fake.stream = "current"

        class OnStream(Within):
            def __enter__(self):
                fake.stream = "side"

        class OnDevice(Within):
            def __enter__(self):
                fake.calls.append(f"on {self.arguments[0]}")

        class Graph(Within):
            def __enter__(self):
                assert self.keywords["capture_error_mode"] == "thread_local"
                assert isinstance(self.keywords["stream"], Stream)
                fake.calls.append("record")
                fake.stream = "side"

            def __exit__(self, *error):
                if fake.fails:  # as PyTorch does, which then leaves its stream behind
                    raise RuntimeError("operation failed due to a previous error during capture")
                fake.stream = "current"

        patches = {
            "CUDAGraph": lambda: type("CUDAGraph", (), {"replay": lambda self: fake.calls.append("replay")})(),
            "Stream": Stream,
            "current_stream": lambda: Current("current"),
            "set_stream": lambda stream: setattr(fake, "stream", str(stream)),
            "stream": OnStream,
            "device": OnDevice,
            "graph": Graph,
            "synchronize": lambda: fake.calls.append("synchronize"),
        }
        for name, value in patches.items():
            monkeypatch.setattr(torch.cuda, name, value)


def test_how_a_cuda_graph_is_recorded(monkeypatch):
    fake = FakeGraphs(monkeypatch)
    seen = []

    def network(window):
        seen.append((fake.stream, window.clone(), window.data_ptr()))
        fake.calls.append("run")
        return window.add_(1)

    given, other = noise(1, 1, 4, 4, 4), noise(1, 1, 4, 4, 4, seed=1)
    before = given.clone()
    recording = graphs.CudaRecording(network, given)
    warm_up = ["on cpu", "side waits for current", *["run"] * graphs.WARM_UPS]
    assert fake.calls == [*warm_up, "synchronize", "record", "run", "current waits for side"]
    assert all(stream == "side" and torch.equal(window, before) for stream, window, _ in seen)
    assert {address for *_, address in seen} == {recording.input.data_ptr()} != {given.data_ptr()}
    assert torch.equal(given, before) and fake.stream == "current"
    assert recording(other) is recording.output and fake.calls[-1] == "replay"
    assert torch.equal(recording.input, other)


def test_a_recording_that_fails_gives_the_stream_back(monkeypatch):
    fake = FakeGraphs(monkeypatch, fails=True)
    with pytest.raises(RuntimeError, match="capture"):
        graphs.CudaRecording(lambda window: window, noise(1, 1, 4, 4, 4))
    assert fake.stream == "current"


# On a device


needs_cuda = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def cuda_test(test):
    for mark in needs_cuda:
        test = mark(test)
    return test


@cuda_test
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cuda_graph_gives_what_the_network_gives(dtype, autocast):
    from medseg3d.networks import SwinUNETR

    torch.manual_seed(0)
    network = SwinUNETR(1, 5, feature_size=12).eval().cuda()
    precise = in_precision(network, dtype, autocast)
    both = Replayed(precise, MANY)
    for number in range(AFTER + 4):
        window = noise(2, 1, 64, 64, 64, seed=number).cuda()
        assert agree(both(window), precise(window))
    assert both.failure == "" and len(both._recordings) == 1


@cuda_test
def test_a_network_that_waits_for_a_value_runs_without_a_graph():
    class Waits(Counted):
        def forward(self, window):
            return self.convolution(window) * window.abs().max().item()

    network = Waits().eval().cuda()
    both = Replayed(network, MANY)
    stream = torch.cuda.current_stream()
    for number in range(AFTER + 3):
        window = noise(1, 1, 16, 16, 16, seed=number).cuda()
        torch.testing.assert_close(both(window), network(window))
    assert both.failure.startswith("it cannot be recorded")
    assert torch.cuda.current_stream() == stream
    assert torch.ones(3, device="cuda").sum().item() == 3


def test_a_compiled_network_has_no_truth_value():
    """It has no len(), so that `compiled or other` would raise."""
    compiled = torch.compile(Counted(), backend="eager")
    window = torch.rand(1, 1, 4, 4, 4)
    assert torch.equal(Replayed(lambda x: x + 1, WORTH_FROM, made_of=compiled)(window), window + 1)

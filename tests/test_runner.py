"""How a network is run: its precision is decided once, compilers may fail, and mirror images change their sides."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import medseg3d as ms
from medseg3d import runner as runners
from medseg3d.inference.precision import Precision
from medseg3d.runner import Runner
from tests import tiny_bundles as tiny

CPU = torch.device("cpu")
WINDOW = torch.linspace(-1, 1, 2 * 3 * 4).reshape(1, 1, 2, 3, 4)


def network():
    torch.manual_seed(0)
    return nn.Conv3d(1, 3, 1).requires_grad_(False).eval()


def run(runner, warnings=None, example=lambda: WINDOW, **options):
    """What the network answers to the window."""
    return runner(lambda ready: ready(WINDOW), example, [] if warnings is None else warnings, **options)


@pytest.fixture
def decisions(monkeypatch):
    """The windows on which the precision was decided; it is bfloat16 each time."""
    windows = []

    def choose(network, window, device, wanted):
        windows.append(window)
        return Precision(torch.bfloat16, f"{wanted} it is")

    monkeypatch.setattr(runners, "choose_precision", choose)
    return windows


# Precision


def test_the_precision_is_decided_once(decisions):
    runner = Runner(network(), CPU, "bf16")
    assert runner.precision is None and not decisions
    answers = [run(runner), run(runner, example=lambda: pytest.fail("it was decided already"))]
    assert len(decisions) == 1 and decisions[0] is WINDOW and runner.precision.reason == "bf16 it is"
    assert all(answer.dtype == torch.bfloat16 for answer in answers)
    assert runner.network.weight.dtype == torch.float32


def test_float32_needs_no_decision(decisions):
    runner = Runner(network(), CPU)
    answer = run(runner, example=lambda: pytest.fail("no window is needed"))
    assert answer.dtype == torch.float32 and not decisions and runner.precision is None


@pytest.mark.parametrize(
    ("wanted", "told", "lacking"),
    [("auto", False, "one network"), ("bf16", True, "one network"), ("bf16", True, "windows")],
)
def test_where_nothing_can_be_tried_it_is_float32_and_says_so(wanted, told, lacking, decisions):
    own, warnings = network(), []
    runner = Runner(own if lacking == "windows" else nn.ModuleList([own]), CPU, wanted)
    example = None if lacking == "windows" else lambda: WINDOW
    for _ in range(2):
        ready = runner(lambda ready: ready, example, warnings)
        assert ready is runner.network
    assert not decisions and runner.precision.dtype == torch.float32
    assert ("windows of this inferer" if lacking == "windows" else "several networks") in runner.precision.reason
    assert len(warnings) == told and all("bf16 was asked for" in warning for warning in warnings)


def test_the_choice_waits_for_a_window(decisions):
    runner = Runner(network(), CPU, "auto")
    assert runner(lambda ready: ready, None, []) is runner.network and runner.precision is None
    run(runner)
    assert decisions and runner.precision is not None


def test_an_impossible_precision_is_refused():
    with pytest.raises(ValueError, match="'fp16' needs a GPU"):
        run(Runner(network(), CPU, "fp16"))


# Compilers


def failing(calls):
    def compile(network):
        def run(window):
            calls.append(network)
            raise RuntimeError("no compiler\n" + "was found " * 50)

        return run

    return compile


def test_where_it_cannot_be_compiled_it_runs_as_it_is(monkeypatch):
    calls, warnings = [], []
    monkeypatch.setattr(torch, "compile", failing(calls))
    runner = Runner(network(), CPU, compile=True)
    for _ in range(2):
        assert torch.equal(run(runner, warnings), runner.network(WINDOW))
    (warning,) = warnings
    assert "could not be compiled" in warning and "no compiler was found" in warning and len(warning) < 300
    assert len(calls) == 1 and not runner.compiles


def test_an_error_that_comes_again_is_no_failure_to_compile(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda network: network)
    runner, warnings = Runner(network(), CPU, compile=True), []
    with pytest.raises(ValueError, match="no such scan"):
        runner(lambda ready: (_ for _ in ()).throw(ValueError("no such scan")), None, warnings)
    assert runner.compiles and not warnings


def test_what_is_compiled_runs_in_the_precision_that_was_chosen(decisions, monkeypatch):
    compiled = []

    def compile(network):
        compiled.append(network)
        return network

    monkeypatch.setattr(torch, "compile", compile)
    runner = Runner(network(), CPU, "bf16", compile=True)
    assert run(runner).dtype == run(runner).dtype == torch.bfloat16 and len(compiled) == 1


def test_a_compiled_network_does_not_outlive_its_precision(decisions, monkeypatch):
    """Float32 as long as the choice is not worth its time; what was compiled then is not what runs later."""
    monkeypatch.setattr(torch, "compile", lambda network: network)
    runner = Runner(network(), CPU, "auto", compile=True)
    assert run(runner, example=None).dtype == torch.float32
    assert run(runner).dtype == torch.bfloat16


# Mirror images


def asymmetric(window):
    """Class 1 where the window grows along its first axis: the left side; class 2 the right."""
    step = torch.diff(window, dim=2, append=window[:, :, -1:])
    return torch.cat([torch.zeros_like(step), step, -step], 1)


def test_no_mirror_is_the_network_itself():
    runner = Runner(network(), CPU)
    assert runner(lambda ready: ready, None, []) is runner.network


@pytest.mark.parametrize(
    ("mirror", "laterality_axis", "dim", "swapped"),
    [(True, 0, 2, True), (True, 2, 4, True), ([0], 0, 2, True), ([0], 1, 2, False)],
)
def test_sides_change_places_in_the_mirror_of_the_laterality_axis(mirror, laterality_axis, dim, swapped):
    answer = run(Runner(asymmetric, CPU, mirror=mirror, pairs=((1, 2),)), laterality_axis=laterality_axis)
    plain, mirrored = asymmetric(WINDOW), asymmetric(WINDOW.flip(dim)).flip(dim)
    if swapped:
        mirrored = mirrored[:, [0, 2, 1]]
    torch.testing.assert_close(answer, (plain + mirrored) / 2)


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory):
    """A model that averages over mirror images."""
    folder = tiny.write_own_bundle(tmp_path_factory.mktemp("mirror") / "own_ct_unet")
    return ms.load_model(folder, "cpu", trust=True, precision="fp32", mirror=True)


@pytest.mark.parametrize("axis", [0, 1])
def test_the_labels_of_a_mirrored_scan_are_mirrored_with_sides_exchanged(axis, mirrored, models):
    """``axis`` is the one from left to right; the random U-Net by itself does no such thing."""
    matrix = np.diag([4.0, 4.0, 4.0])[[0, 1, 2] if axis == 0 else [1, 0, 2]]
    affine = tiny.centred(matrix)
    array = tiny.ct(affine)
    exchange = np.array([0, 2, 1], np.uint8)
    shares = []
    for model in (mirrored, models.own):
        labels = model.predict((array, affine)).segmentation.array
        other = model.predict((np.flip(array, axis).copy(), affine)).segmentation.array
        assert len(np.unique(labels)) == 3
        shares.append(np.mean(labels == exchange[np.flip(other, axis)]))
    assert shares[0] > 0.97 and shares[0] > shares[1] + 0.05


# Mirror images of slices


def slices_bundle(folder, axes, neighbours):
    config = tiny.own_config({"_target_": "torch.nn.Conv2d", "in_channels": 1 + 2 * neighbours, "out_channels": 3})
    config["network_def"] |= {"kernel_size": 3, "padding": 1}
    config["inferer"] = {"_target_": "medseg3d.inference.Slices", "axes": axes, "neighbours": neighbours}
    torch.manual_seed(0)
    state = nn.Conv2d(1 + 2 * neighbours, 3, 3).state_dict()
    return tiny.write_bundle(folder, config, {"weight": state["weight"] * 3, "bias": state["bias"] * 0})


@pytest.mark.parametrize(("axes", "neighbours"), [(-1, 0), (0, 1), ([0, 1, 2], 1)])
def test_slices_of_a_mirrored_scan_are_mirrored_with_sides_exchanged(axes, neighbours, tmp_path):
    bundle = slices_bundle(tmp_path / "slices_ct_conv", axes, neighbours)
    array, exchange, shares = tiny.ct(), np.array([0, 2, 1], np.uint8), []
    for mirror in (True, False):
        model = ms.load_model(bundle, "cpu", trust=True, precision="fp32", mirror=mirror, uncertainty="margin")
        result, other = model.predict((array, tiny.LPS)), model.predict((array[::-1].copy(), tiny.LPS))
        labels = result.segmentation.array
        assert len(np.unique(labels)) == 3
        shares.append(np.mean(labels == exchange[other.segmentation.array[::-1]]))
    assert shares[0] > 0.97 and shares[0] > shares[1] + 0.05


def test_slices_without_a_mirror_image_say_so(tmp_path, models, monkeypatch):
    model = ms.load_model(slices_bundle(tmp_path / "s", 0, 0), "cpu", trust=True, precision="fp32", mirror=True)
    with pytest.raises(ValueError, match="slices along axis 0 are the same in a mirror along it"):
        model.predict((tiny.ct(), tiny.LPS))
    monkeypatch.setattr(model, "inferer", ms.inference.CoarseToFine())
    with pytest.raises(ValueError, match="one organ has no mirror image on the patient's other side"):
        model.predict((tiny.ct(), tiny.LPS))


def test_windows_of_unknown_axes_are_not_mirrored(tmp_path):
    """Slices of MONAI's: the second axis of a slice may be any of the scan's."""
    config = tiny.own_config({"_target_": "torch.nn.Conv2d", "in_channels": 1, "out_channels": 3, "kernel_size": 1})
    config["inferer"] = {"_target_": "SliceInferer", "roi_size": [32, 32], "spatial_dim": 0}
    bundle = tiny.write_bundle(tmp_path / "slices", config, nn.Conv2d(1, 3, 1).state_dict())
    with pytest.raises(ValueError, match="axes of the scan, and those of SliceInferer are not known"):
        ms.load_model(bundle, "cpu", trust=True, mirror=True)
    config["inferer"] |= {"_target_": "SlidingWindowInfererAdapt", "roi_size": [32, 32, 32]}
    del config["inferer"]["spatial_dim"]
    ms.load_model(tiny.write_bundle(tmp_path / "slices", config, None), "cpu", trust=True, mirror=True)


def test_labels_of_one_side_and_name_matter_to_a_mirror_alone(tmp_path):
    bundle = tiny.write_threshold_bundle(tmp_path / "twice", ("background", "lung left", "lung_left"))
    ms.load_model(bundle, "cpu", trust=True)
    with pytest.raises(ValueError, match="are both the left side"):
        ms.load_model(bundle, "cpu", trust=True, mirror=True)

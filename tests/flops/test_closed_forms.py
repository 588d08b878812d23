"""The course's arithmetic, to the digit."""

from __future__ import annotations

import json
from math import prod

import pytest
import torch
from torch import nn

from medseg3d.flops import Attention, Convolution, PatchEmbedding, swin_stages
from tests.conftest import SHARED

FILE = SHARED / "golden" / "3d" / "flops" / "flops.json"
GOLDEN = json.loads(FILE.read_text()) if FILE.is_file() else {}


def cases(part):
    """Names of the golden cases; a single one that skips where the file is absent."""
    return sorted(GOLDEN[part]) if GOLDEN else ["absent"]


@pytest.fixture
def golden(shared):
    shared("golden", "3d", "flops", "flops.json")
    return GOLDEN


@pytest.mark.parametrize("name", cases("conv"))
def test_convolutions_of_the_course(name, golden):
    case = golden["conv"][name]
    *size, inputs = case["in"]
    *output, outputs = case["out"]
    conv = Convolution(inputs, outputs, case["kernel"], size, case["stride"], case["pad"], groups=case["groups"])
    assert conv.output_size == tuple(output)
    assert (conv.weights, conv.weights + conv.biases) == (case["params_no_bias"], case["params_bias"])
    assert (conv.macs, conv.flops) == (case["macs"], case["flops"])


@pytest.mark.parametrize("name", cases("attention"))
def test_full_attention(name, golden):
    case = golden["attention"][name]
    attention = Attention((case["tokens"],), case["d"])
    assert (attention.windows, attention.tokens_per_window) == (1, case["tokens"])
    assert (attention.linear_flops, attention.quadratic_flops) == (case["linear"], case["quadratic"])
    assert (attention.flops, attention.scores_per_head) == (case["flops"], case["score_elements_per_head"])


@pytest.mark.parametrize("name", cases("windowed_attention"))
def test_windowed_attention(name, golden):
    case = golden["windowed_attention"][name]
    attention = Attention(case["spatial"], case["d"], case["window"])
    assert attention.padded == tuple(case["padded"])
    assert (attention.windows, attention.tokens_per_window) == (case["windows"], case["tokens_per_window"])
    assert (attention.linear_flops, attention.quadratic_flops) == (case["linear"], case["quadratic"])
    assert (attention.flops, attention.scores_per_head) == (case["flops"], case["score_elements_per_head"])


@pytest.mark.parametrize("name", cases("patch_embedding"))
def test_tokens_of_unetr_and_swin_unetr(name, golden):
    case = golden["patch_embedding"][name]
    *size, channels = case["volume"]
    embedding = PatchEmbedding(size, channels, case["patch"], case["d"])
    assert (embedding.grid, embedding.tokens) == (tuple(case["grid"]), case["tokens"])
    assert (embedding.patch_vector, embedding.weights) == (case["patch_vector"], case["params_no_bias"])
    assert embedding.flops == case["flops"]


def test_the_exercise(golden):
    case = golden["course_exercise"]
    full, windowed = Attention((64, 64, 32), 256), Attention((64, 64, 32), 256, (8, 8, 8))
    assert (full.flops, windowed.flops) == (case["full_flops"], case["window_flops"])
    assert (windowed.windows, windowed.tokens_per_window) == (case["windows"], case["tokens_per_window"])
    assert full.flops / windowed.flops == case["ratio"]
    assert full.quadratic_flops / windowed.quadratic_flops == case["ratio_quadratic_part"]


@pytest.mark.parametrize("edge", [96, 128])
def test_stages_of_swin_unetr(edge, golden):
    stages = swin_stages((edge,) * 3)
    assert [stage.grid for stage in stages] == [(edge // n,) * 3 for n in (2, 4, 8, 16)]
    assert [stage.width for stage in stages] == [48, 96, 192, 384]
    for number in (1, 4):
        case = golden["windowed_attention"][f"swin_stage{number}_{edge}"]
        assert (stages[number - 1].flops, stages[number - 1].windows) == (case["flops"], case["windows"])


CONVOLUTIONS = {
    "same": {"padding": "same", "kernel_size": 3},
    "same, dilated": {"padding": "same", "kernel_size": 3, "dilation": 2},
    "strided": {"kernel_size": (2, 3, 1), "stride": (2, 1, 3), "padding": (1, 0, 2)},
    "grouped": {"kernel_size": 3, "groups": 4},
}


@pytest.mark.parametrize(
    ("name", "transposed"), [*((name, False) for name in CONVOLUTIONS), ("strided", True), ("grouped", True)]
)
def test_convolutions_are_those_of_torch(name, transposed):
    arguments = dict(CONVOLUTIONS[name])
    with torch.device("meta"):
        layer = (nn.ConvTranspose3d if transposed else nn.Conv3d)(8, 12, **arguments)
        output = layer(torch.empty(1, 8, 9, 10, 11))
    arguments["kernel"] = layer.kernel_size
    del arguments["kernel_size"]
    conv = Convolution(8, 12, size=(9, 10, 11), transposed=transposed, **arguments)
    assert conv.output_size == tuple(output.shape[2:])
    assert (conv.weights, conv.biases) == (layer.weight.numel(), layer.bias.numel())
    assert conv.macs == prod((9, 10, 11) if transposed else output.shape[2:]) * layer.weight.numel()


def test_figures_are_all_numbers_by_name():
    figures = Attention((4, 6), 8, (3, 9)).figures
    assert figures["padded"] == (6, 6) and figures["windows"] == 2 and figures["tokens_per_window"] == 18
    assert figures["flops"] == 2 * figures["macs"] == figures["linear_flops"] + figures["quadratic_flops"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Convolution(4, 6, (3,), (9,), groups=4), "channels must be multiples of the groups"),
        (lambda: Convolution(4, 6, (3, 3), (9,)), "the same axes"),
        (lambda: Convolution(4, 6, (3,), (2,)), "does not fit into an input of"),
        (lambda: Convolution(4, 6, (3,), (9,), padding="valid"), "padding needs one number"),
        (lambda: Convolution(4, 0, (3,), (9,)), "channels must be 1 or more, got 4 0"),
        (lambda: Attention((8, 8), 4, (2,)), "each of the grid's 2 axes"),
        (lambda: Attention((), 4), "tokens must be 1 or more, got none"),
        (lambda: PatchEmbedding((96, 90), 1, 16, 768), r"multiples of the patch 16, got \(96, 90\); next: \(96, 96\)"),
        (lambda: swin_stages((95, 96, 96)), "multiples of the patch 2"),
        (lambda: swin_stages((96, 96, 96), stages=0), "stages must be 1 or more, got 0"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()

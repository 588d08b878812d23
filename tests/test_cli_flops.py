"""`medseg3d flops`: networks, bundles on scans, formulas."""

from __future__ import annotations

import csv
import json

import pytest

from medseg3d.flops import Attention, count_operations
from medseg3d.networks import UNet
from tests import tiny_bundles as tiny


@pytest.fixture
def flops(run):
    """flops(...) -> lines on stdout; flops.json(...) and flops.csv(...) read them."""

    def lines(*arguments):
        code, out, err = run("flops", *arguments)
        assert (code, err) == (0, [])
        return out

    lines.json = lambda *arguments: json.loads("\n".join(lines(*arguments, "--json")))
    lines.csv = lambda *arguments: list(csv.DictReader(lines(*arguments, "--csv")))
    return lines


SWIN = ["swin_unetr", "--size", 96, 96, 96, "--set", "feature_size=48", "--set", "out_channels=14"]


def test_a_network(flops):
    out = flops(*SWIN)
    assert out[0] == "swin_unetr(in_channels=1, out_channels=14, feature_size=48)"
    text = "\n".join(out)
    assert "637.05 GFLOP = 318.52 GMAC" in text and "62,187,296" in text and "making tokens of voxels" in text
    assert out[-1].startswith("A multiply-add (MAC) is 2 FLOPs.")
    found = flops.json(*SWIN)
    assert (found["flops"], found["macs"]) == (637049465472, 637049465472 // 2)
    assert found["input_shape"] == [1, 1, 96, 96, 96] and found["receptive_field"] == [None] * 3


def test_the_table_of_modules(flops):
    small = ["unet", "--size", 16, "--set", "channels=[4, 8]"]
    found, rows = flops.json(*small), flops.csv(*small)
    assert [row["module"] for row in rows] == [row["module"] for row in found["modules"]]
    assert sum(int(row["flops"]) for row in rows) == found["flops"]
    assert len(flops.csv(*small, "--depth", 3)) > len(rows) > len(flops.csv(*small, "--depth", 0)) == 1


def test_what_is_set_and_what_is_usual(flops):
    small = ["unet", "--size", 16, "--set", "spatial_dims=2", "--set", "channels=[4, 8]", "--set", "norm=instance"]
    expected = count_operations(UNet(2, channels=[4, 8], norm="instance"), (1, 1, 16, 16))
    found = flops.json(*small)
    assert (found["flops"], found["parameters"]) == (expected.flops, expected.parameters)
    assert found["arguments"] == {"spatial_dims": 2, "channels": [4, 8], "norm": "instance"}
    # 5 voxels, pooled 6, 14 behind two convolutions of step 2; two more on the way up meet 3 of those, 2 voxels apart.
    assert found["receptive_field"] == [18, 18] and found["stride"] == ["1", "1"]
    unetr = flops.json("unetr", "--size", 32, "--depth", 0)
    assert unetr["arguments"] == {"in_channels": 1, "out_channels": 2, "img_size": [32] * 3}
    assert flops.json("fcn", "--size", 64, 96)["input_shape"] == [1, 3, 64, 96]


def test_settings_follow_one_set_or_several(flops):
    one = ["unet", "--size", 32, "--set", "in_channels=2", "out_channels=3"]
    assert flops.json(*one) == flops.json(*one[:-1], "--set", one[-1])
    assert flops.json(*one)["arguments"] == {"in_channels": 2, "out_channels": 3}


def test_a_detector_is_run(flops):
    out = flops("mask_rcnn", "--size", 32, "--set", "backbone=resnet18", "--set", "min_size=32", "--set", "max_size=32")
    assert "its work depends on what it sees: counted on random values, with untrained weights" in out
    assert any(line.startswith("roi_heads") for line in out)


def test_formulas(flops):
    conv = flops.json("conv", "--in", 512, "--out", 1024, "--kernel", 2, "--stride", 2, "--size", 256, 256, 64)["conv"]
    assert (conv["output_size"], conv["weights"], conv["flops"]) == ([128, 128, 32], 4194304, 2**42)
    same = ["conv", "--in", 8, "--out", 8, "--kernel", 3, "--size", 9, 9, "--groups", 8, "--padding"]
    assert flops.json(*same, "same")["conv"] == flops.json(*same, 1)["conv"]
    dilated = flops.json(*same[:-1], "--dilation", 2, 1, "--transposed")["conv"]
    assert dilated["output_size"] == [13, 11] and dilated["macs"] == 81 * 72
    (patches,) = flops.csv("patches", "--in", 4, "--size", 128, 128, 128, "--patch", 16, "--dim", 768)
    assert (patches["grid"], patches["tokens"], patches["flops"]) == ("8 x 8 x 8", "512", "12884901888")


def test_windows_against_full_attention(flops):
    exercise = ["attention", "--dim", 256, "--tokens", 64, 64, 32, "--window", 8]
    found = flops.json(*exercise)
    assert (found["full"]["flops"], found["windowed"]["flops"]) == (17660905521152, 137438953472)
    assert found["ratio"] == 128.5
    text = "\n".join(flops(*exercise))
    assert "17,660,905,521,152" in text and "137,438,953,472" in text and "128.5 times" in text
    (row,) = (row for row in flops.csv(*exercise) if row["figure"] == "quadratic_flops")
    assert int(row["full"]) == 256 * int(row["windowed"])
    assert flops.json("attention", "--dim", 768, "--tokens", 216)["attention"]["flops"] == Attention((216,), 768).flops


def test_a_bundle_on_a_scan(flops, bundles):
    scan = ["-m", bundles.own, "--trust", "--size", 40, 36, 38, "--spacing", 4, 4, 4]
    found = {row["strategy"]: row for row in flops.json(*scan)["strategies"]}
    assert [name for name, row in found.items() if row["own"]] == ["sub-volumes"]
    out = flops(*scan)
    assert out[0] == "own_ct_unet, a case of 40 x 36 x 38 voxels of 4.0 x 4.0 x 4.0 mm"
    assert any(line.startswith("downsampled *") for line in out) and any(line.startswith("* not the") for line in out)
    (row,) = (row for row in flops.csv(*scan) if row["own"] == "True")
    assert int(row["flops"]) == found["sub-volumes"]["flops"] == 2 * found["sub-volumes"]["macs"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say what to count"),
        (["unet", "-m", "headneck_ct_unet"], "either unet or the bundle headneck_ct_unet is counted: leave unet or"),
        (["--set", "feature_size=48", "swin_unetr"], "say what to count, before any option"),
        (["resnet", "--size", "96"], "neither a network (fcn, fcn_resnet, deconvnet, unet"),
        (["resnet"], "neither a network (fcn, fcn_resnet, deconvnet, unet"),
        (["swin-unetr", "--size", "96"], "; did you mean swin_unetr?"),
        (["unet"], "unet needs --size: of its input"),
        (["unet", "--size", "-16"], "--size takes voxels, 1 or more along each axis; got -16"),
        (["unet", "--size", "96", "--set", "channels=4"], "unet cannot be made with channels=4: "),
        (["unet", "--size", "96", "96"], "--size needs 3 numbers"),
        (["unet", "--size", "96", "--set", "width=3"], "unet has no argument 'width'; it has spatial_dims"),
        (["unet", "--size", "96", "--set", "width"], "--set takes NAME=VALUE"),
        (["conv", "--in", "3"], "conv needs --out"),
        (["conv", "--in", "3", "--out", "3", "--kernel", "3", "--size", "9", "--padding", "both"], "the word same"),
        (["attention", "--dim", "8"], "attention needs --tokens"),
        (["-m", "headneck_ct_unet", "--size", "64", "64", "64"], "headneck_ct_unet needs --spacing"),
        (["unet", "--size", "96", "--json", "--csv"], "not allowed with"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments, message, run):
    code, out, err = run("flops", *arguments)
    assert (code, out) == (2, []) and message in err[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["unet", "--size", "90", "96", "96"], "the next size that it takes is (96, 96, 96)"),
        (["swin_unetr", "--size", "100"], "multiples of 32"),
        (["patches", "--size", "100", "--patch", "16", "--dim", "8"], "next: (112,)"),
        (["conv", "--in", "3", "--out", "3", "--kernel", "3", "3", "--size", "9"], "the same axes"),
        (["attention", "--dim", "8", "--tokens", "8", "8", "--window", "2", "2", "2"], "the grid's 2 axes"),
        (["-m", "headneck_ct_unet", "--size", "64", "64", "--spacing", "1"], "3 numbers above 0 are needed, got 64 64"),
        (["-m", "lungs", "--size", "64", "--spacing", "1"], "unknown model 'lungs'"),
    ],
)
def test_what_does_not_fit_is_told(arguments, message, run):
    code, out, err = run("flops", *arguments)
    assert (code, out) == (1, []) and message in err[-1]


def test_a_foreign_bundle_needs_trust(run, bundles):
    code, _, err = run("flops", "-m", bundles.own, "--size", *tiny.SHAPE, "--spacing", 4, 4, 4)
    assert code == 1 and "--trust" in err[-1]

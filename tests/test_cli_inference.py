"""predict's options of how a network runs: choices, memory limits and plans."""

from __future__ import annotations

import json

import pytest

from medseg3d import cli
from medseg3d.io import read_label_table
from tests import tiny_bundles as tiny
from tests.command_line import names

# Sizes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("6G", 6 * 2**30),
        ("800M", 800 * 2**20),
        ("1.5T", 3 * 2**39),
        ("2k", 2048),
        ("6 GB", 6 * 2**30),
        ("6GiB", 6 * 2**30),
        ("100b", 100),
    ],
)
@pytest.mark.parametrize("flag", ["--max-ram", "--max-vram"])
def test_sizes(flag, text, size):
    args = cli._parser().parse_args(["predict", "-i", "a", "-o", "b", flag, text])
    assert getattr(args, flag[2:].replace("-", "_")) == size


@pytest.mark.parametrize("text", ["", "much", "6X", "G", "-6G", "6G 2M", "1,5G", "0x10", "6KM", "inf", "6", "1.5"])
def test_bad_sizes(text, run):
    code, out, err = run("predict", "-i", "ct.nii.gz", "-o", "out", f"--max-ram={text}")
    assert (code, out) == (2, []) and "such as 6G or 800M" in err[-1] and repr(text) in err[-1]


def test_a_size_without_a_unit_is_asked_for_one(run):
    code, out, err = run("predict", "-i", "ct.nii.gz", "-o", "out", "--max-vram", "6")
    assert (code, out) == (2, []) and err[-1].endswith("got '6': 6 bytes? say 6G, or 6B")


# Choices


def test_choices_reach_the_model_and_the_report(predict, ct_file, tmp_path):
    chosen = ("--strategy", "sub-volumes", "--overlap", "0.75", "--mirror", "--max-ram", "1T", "--precision", "bf16")
    code, _, _ = predict(ct_file, tmp_path / "seg.nii.gz", "-rp", *chosen)
    assert code == 0
    options = json.loads((tmp_path / "seg.run.json").read_text())["options"]
    assert (options["strategy"], options["overlap"], options["mirror"]) == ("sub-volumes", 0.75, True)
    assert options["max_ram"] == 2**40 and options["precision"].startswith("bfloat16")


def test_models_with_labels_of_one_name_can_be_united(run, bundles, ct_file, tmp_path):
    models = ("-m", bundles.own, bundles.zoo, "--trust", "-d", "cpu")
    code, out, err = run("predict", "-i", ct_file, "-o", tmp_path / "seg.nii.gz", *models)
    assert (code, out) == (1, [])
    assert (
        err[-1].startswith("error: own_ct_unet 0.5.3 and ")
        and "both have the label left, right: say --unite" in err[-1]
    )
    code, out, _ = run("predict", "-i", ct_file, "-o", tmp_path / "seg.nii.gz", *models, "--unite")
    assert code == 0 and read_label_table(out[0]).names == {1: "left", 2: "right"}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--overlap", "1"), "overlap must lie in [0, 1)"),
        (("--strategy", "slices"), "'slices' does not suit a network of 3D convolutions"),
        (("--strategy", "downsampled", "--overlap", "0.5"), "overlap is of windows"),
        (("--precision", "fp16"), "precision 'fp16' needs a GPU"),
    ],
)
def test_choices_that_cannot_be(options, reason, predict, ct_file, tmp_path):
    code, out, err = predict(ct_file, tmp_path / "seg.nii.gz", *options)
    assert (code, out, len(err)) == (1, [], 1) and reason in err[0] and names(tmp_path) == []


# Plans and limits


def test_plan_writes_nothing(predict, ct_file, tmp_path):
    code, out, err = predict(ct_file, tmp_path / "out" / "seg.nii.gz", "--plan", "-s", "-p", "-rp")
    assert (code, err) == (0, []) and out[0] == "ct, bone_ct_threshold 0.5.3"
    assert out[1].startswith("  strategy: SubVolumes, ") and out[1].endswith(" windows")
    assert [line.split(":")[0].strip() for line in out[2:]] == ["labels onto the scan's grid", "time", "memory"]
    assert names(tmp_path) == [] and not (tmp_path / "out").exists()


def test_plans_of_several_scans(predict, ct_file, tmp_path):
    other = tiny.write_ct(tmp_path / "other.nii.gz")
    code, out, _ = predict([ct_file, other], tmp_path / "out", "--plan")
    assert code == 0 and [line.split(",")[0] for line in out if not line.startswith(" ")] == ["ct", "other"]
    assert names(tmp_path) == ["other.nii.gz"]


@pytest.mark.parametrize("options", [(), ("--plan",)])
def test_over_the_limit_is_exit_code_5(options, predict, ct_file, tmp_path):
    code, out, err = predict(ct_file, tmp_path / "seg.nii.gz", "--max-ram", "1M", *options)
    assert (code, out, len(err)) == (5, [], 1) and names(tmp_path) == []
    assert "the scan needs about" in err[0] and "crop" in err[0] and "OverMemoryLimit" not in err[0]


def test_a_generous_limit_changes_nothing(predict, ct_file, tmp_path):
    code, out, err = predict(ct_file, tmp_path / "seg.nii.gz", "--max-ram", "1T")
    assert (code, err) == (0, []) and out == [str(tmp_path / "seg.nii.gz")]


def test_a_limit_of_a_device_that_is_not_used_is_told(predict, ct_file, tmp_path):
    code, _, err = predict(ct_file, tmp_path / "seg.nii.gz", "--max-vram", "1M")
    assert code == 0 and err == [
        "note: max_vram is of the memory of a CUDA device, and the network runs on cpu: it limits nothing"
    ]


def test_a_precision_that_the_device_lacks_is_refused_before_any_case(predict, ct_file, tmp_path):
    scans = [ct_file, tiny.write_ct(tmp_path / "other.nii.gz")]
    code, out, err = predict(scans, tmp_path / "out", "--precision", "fp16")
    assert (code, out, len(err)) == (1, [], 1) and "needs a GPU" in err[0]

"""Tiny models on a made-up CT: what is measured, what is done again, and what happens when something fails."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from medseg3d.compare import Contender, compare
from medseg3d.compare.contenders import Conditions, contenders_of
from medseg3d.compare.measuring import Bench
from medseg3d.compare.worker import Failed, Worker
from medseg3d.data.datasets import Case
from medseg3d.io import write_label_map
from medseg3d.io.labels import LabelTable
from medseg3d.volume import Volume
from tests import tiny_bundles as tiny

LABELS = {0: "background", 3: "Bone"}
HERE = partial(compare, labels=LABELS, device="cpu", precision="fp32", trust=True, own_process=False)


@pytest.fixture
def cases(tmp_path):
    """Two cases whose balls of bone have the number 3."""
    found = []
    for name in ("first", "second"):
        image = tiny.write_ct(tmp_path / "data" / f"{name}.nii.gz")
        label = Volume((3 * tiny.bone()).astype(np.uint8), tiny.LPS)
        write_label_map(label, tmp_path / "data" / f"{name}_seg.nii.gz", LabelTable(LABELS))
        found.append(Case(name, (image,), tmp_path / "data" / f"{name}_seg.nii.gz", name))
    return found


@pytest.fixture
def done(monkeypatch):
    """The cases that were measured, one after another."""
    measured, measure = [], Bench.measure

    def noted(bench, case, prediction):
        measured.append(case.name)
        return measure(bench, case, prediction)

    monkeypatch.setattr(Bench, "measure", noted)
    return measured


def test_labels_are_matched_by_name_and_costs_measured(bundles, cases, tmp_path):
    result = HERE([bundles.threshold], cases, tmp_path / "out")
    assert [(row["case"], row["name"]) for row in result.rows] == [("first", "Bone"), ("second", "Bone")]
    assert all(row["label"] == 3 and row["dice"] > 0.9 for row in result.rows), "numbers differ, names do not"
    assert result.shared == ("Bone",) and result.failures == ()
    for row in result.costs:
        assert row["seconds"] > row["network_seconds"] > 0 and row["cpu_seconds"] > 0
        assert row["peak_memory_mb"] > 50 and row["device_peak_mb"] is None
        assert row["windows"] > 1 and row["gflop"] == pytest.approx(row["windows"] * 32**3 * 2 * 2 / 1e9)
    (model,) = result.models
    assert (model.strategy, model.parameters, model.precision) == ("SubVolumes", 4, "float32")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"comparison.html", "comparison.md", "metrics.csv", "costs.csv", "bone_ct_threshold"} <= names
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert page.count("data:image/png;base64,") >= 4, "a reference and a model, in two planes or more"


def test_what_is_done_is_not_done_again(bundles, cases, tmp_path, done):
    first = HERE([bundles.threshold], cases[:1], tmp_path / "out")
    again = HERE([bundles.threshold], cases, tmp_path / "out")
    assert done == ["first", "second"] and again.rows[:1] == first.rows and again.costs[:1] == first.costs
    assert HERE([bundles.threshold], cases, tmp_path / "out") == again
    assert done == ["first", "second"]


@pytest.mark.parametrize("change", ["label", "record", "prediction", "tolerance", "annotated"])
def test_what_changed_is_done_again(bundles, cases, tmp_path, done, change):
    HERE([bundles.threshold], cases, tmp_path / "out")
    own, options = tmp_path / "out" / "bone_ct_threshold", {}
    if change == "label":
        less = np.where(tiny.bone() & (np.indices(tiny.SHAPE)[0] > 20), 3, 0).astype(np.uint8)
        write_label_map(Volume(less, tiny.LPS), cases[0].label, LabelTable(LABELS))
    elif change == "record":
        (own / "first.json").write_text("{")
    elif change == "prediction":
        (own / "first_seg.nii.gz").unlink()
    elif change == "tolerance":
        options = {"nsd_tolerance_mm": 1.0}
    else:
        cases[0] = replace(cases[0], annotated=(3,))
    HERE([bundles.threshold], cases, tmp_path / "out", **options)
    assert done[2:] == (["first", "second"] if change == "tolerance" else ["first"])


def test_a_case_that_fails_is_told_and_the_rest_goes_on(bundles, cases, tmp_path):
    (broken := tmp_path / "data" / "broken.nii.gz").write_bytes(b"no scan")
    gone = replace(cases[0], name="gone", images=(tmp_path / "gone.nii.gz",))
    listed = [replace(cases[0], name="broken", images=(broken,)), gone, cases[1]]
    result = HERE([bundles.threshold], listed, tmp_path / "out")
    assert [row["case"] for row in result.failures] == ["broken", "gone"]
    assert "No such file" in result.failures[1]["error"]
    assert [row["case"] for row in result.rows] == ["second"] and result.failed("bone_ct_threshold") == 2
    assert "broken" in (tmp_path / "out" / "failures.csv").read_text()


def test_a_reference_with_other_numbers_for_the_same_organs_is_refused(bundles, cases, tmp_path):
    label = Volume((2 * tiny.bone()).astype(np.uint8), tiny.LPS)
    write_label_map(label, cases[0].label, LabelTable({0: "background", 2: "Bone", 3: "Air"}))
    result = HERE([bundles.threshold], cases, tmp_path / "out")
    (failure,) = result.failures
    assert failure["case"] == "first" and "calls Bone label 2, but here it is 3" in failure["error"]
    assert [row["case"] for row in result.rows] == ["second"]


def test_a_model_that_cannot_be_loaded_is_told_and_the_rest_goes_on(bundles, cases, tmp_path):
    models = [Contender(bundles.threshold, "slices"), Contender(bundles.threshold)]
    result = HERE(models, cases[:1], tmp_path / "out")
    (failure,) = result.failures
    assert (failure["model"], failure["case"]) == ("bone_ct_threshold slices", "")
    assert "does not suit" in failure["error"] and len(result.costs) == 1
    assert result.models[0].parameters is None


def test_strategies_of_one_network(bundles, cases, tmp_path):
    result = HERE([bundles.threshold], cases[:1], tmp_path / "out", strategies=["sub-volumes", "downsampled"])
    assert [model.strategy for model in result.models] == ["SubVolumes", "Downsampled"]
    assert [row["windows"] > 1 for row in result.costs] == [True, False]


def test_organs_that_were_not_annotated_do_not_count(bundles, cases, tmp_path):
    labels = {**LABELS, 4: "liver"}
    listed = [replace(cases[0], annotated=(4,)), replace(cases[1], annotated=(3, 4))]
    result = compare([bundles.threshold], listed, tmp_path / "out", labels, trust=True, device="cpu", own_process=False)
    assert [row["dice"] is None for row in result.rows] == [True, False]
    assert result.shared == ("Bone",)
    assert any("has no liver" in note for note in result.notes)
    assert any("1 of 2 cases" in note for note in result.notes)


def test_what_cannot_be_compared_is_refused(bundles, cases, tmp_path):
    with pytest.raises(ValueError, match="one case or more"):
        HERE([bundles.threshold], [], tmp_path)
    with pytest.raises(ValueError, match="no label"):
        HERE([bundles.threshold], [replace(cases[0], label=None)], tmp_path)
    with pytest.raises(ValueError, match="2 images"):
        HERE([bundles.threshold], [replace(cases[0], images=cases[0].images * 2)], tmp_path)
    with pytest.raises(ValueError, match="two called first"):
        HERE([bundles.threshold], [cases[0], cases[0]], tmp_path)
    with pytest.raises(ValueError, match="has no label of the references"):
        HERE([bundles.own], cases, tmp_path)
    with pytest.raises(ValueError, match="--trust"):
        compare([bundles.threshold], cases, tmp_path, LABELS)
    assert not list(tmp_path.glob("own_ct_unet*"))


def test_progress_is_told(bundles, cases, tmp_path):
    told = []
    HERE([bundles.threshold], cases, tmp_path / "out", progress=lambda *what: told.append(what[1:]))
    assert told == [("loading", 0, 2), ("first", 0, 2), ("second", 1, 2)]


def test_a_model_has_a_process_of_its_own_and_may_die_in_it(bundles, cases, tmp_path):
    """The second bundle's config ends the process that reads it."""
    deadly = tiny.own_config({"_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": 2, "kernel_size": 1})
    deadly["network"] = "$__import__('os')._exit(7)"
    fatal = tiny.write_bundle(tmp_path / "fatal", deadly, {}, labels=("background", "bone"))
    result = HERE([fatal, bundles.threshold], cases[:1], tmp_path / "out", own_process=True)
    (failure,) = result.failures
    assert failure["model"] == "fatal" and "exit code 7" in failure["error"]
    (row,) = result.rows
    assert row["model"] == "bone_ct_threshold" and row["dice"] > 0.9
    record = json.loads((tmp_path / "out" / "bone_ct_threshold" / "first.json").read_text())
    assert record["costs"]["peak_memory_mb"] >= record["costs"]["held_before_mb"] > 100


def test_a_process_that_ends_between_two_cases_is_told(bundles, cases, tmp_path):
    (contender,), conditions = contenders_of([bundles.threshold]), Conditions({1: "bone"}, "cpu", trust=True)
    with Worker(contender, conditions) as worker:
        worker.load()
        worker._process.kill()
        worker._process.join()
        with pytest.raises(Failed, match=r"the model's process ended for want of memory, it may be \(exit code -9\)"):
            worker.measure(cases[0], tmp_path / "first.nii.gz")


def test_a_process_that_is_ended_cleans_up(bundles):
    (contender,), conditions = contenders_of([bundles.threshold]), Conditions({1: "bone"}, "cpu", trust=True)
    with Worker(contender, conditions) as worker:
        worker.load()
        worker._process.terminate()
        worker._process.join()
        assert worker._process.exitcode == 128 + 15  # by an exception, not by the signal

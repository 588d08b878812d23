"""Plans of scans: what a segmenter hands to them, and that a run does what its plan says."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import medseg3d as ms
from medseg3d import planning, segmenter
from medseg3d.planning import Plan, make_plan
from medseg3d.trial import Peak, WindowCost
from tests import tiny_bundles as tiny
from tests.test_planning import HELD, STEPS


def test_a_plan_changes_nothing(models):
    volume = (tiny.ct(), tiny.LPS)
    expected = models.own.predict(volume).segmentation.array
    scan = models.own.read(volume)
    before, state = scan.volume.array.copy(), [p.clone() for p in models.own.network.parameters()]
    first, second = models.own.plan(scan), models.own.plan(scan)
    assert first.strategy is second.strategy is models.own.inferer
    assert (first.windows, first.order, first.steps) == (second.windows, second.order, ()) and first.windows > 1
    np.testing.assert_array_equal(scan.volume.array, before)
    assert all(torch.equal(a, b) for a, b in zip(state, models.own.network.parameters(), strict=True))
    np.testing.assert_array_equal(models.own.segment(scan).segmentation.array, expected)


def test_limits_are_numbers_of_bytes_or_text_with_a_unit(bundles):
    """As the command line takes them; what is no size is refused before a scan is read."""
    model = ms.load_model(bundles.zoo, "cpu", trust=True, max_ram="6G", max_vram=2**30)
    assert (model.max_ram, model.max_vram, model.room.max_vram) == (6 * 2**30, 2**30, 2**30)
    assert model.plan(model.read((tiny.ct(), tiny.LPS))).steps == ()
    for size in ("6", "much", [6]):
        with pytest.raises(ValueError, match="a size is a number with B, K, M, G or T, such as 6G or 800M; got"):
            ms.load_model(bundles.zoo, "cpu", trust=True, max_ram=size)


def test_what_a_limit_takes_is_told_and_the_labels_hardly_change(models, monkeypatch):
    scan = models.zoo.read((tiny.ct(), tiny.LPS))
    expected = models.zoo.segment(scan)
    monkeypatch.setattr(planning, "current_memory", lambda: HELD)
    monkeypatch.setattr(planning, "measure_window", lambda *_: WindowCost(1.0, 0.0, 0, 0, channels=3))
    monkeypatch.setattr("medseg3d.segmenter.peak_memory", lambda device: nullcontext(Peak()))
    monkeypatch.setattr(models.zoo, "max_ram", models.zoo.plan(scan).ram - 1)
    assert models.zoo.plan(scan).steps == STEPS[1:2]  # on a CPU it is one window at a time anyway
    result = models.zoo.segment(scan)
    told = [f"to stay within the memory that is allowed: {step}" for step in STEPS[1:2]]
    assert [w for w in result.warnings if w not in expected.warnings] == told
    assert np.mean(result.segmentation.array == expected.segmentation.array) > 0.98


def test_time_is_that_of_all_stages_of_a_run(models):
    """Under the names that a run's report has, and "write"."""
    scan = models.own.read((tiny.ct(), tiny.LPS))
    found, run = models.own.plan(scan), models.own.segment(scan)
    assert set(found.stages) == {*run.seconds, "write"} and list(found.stages)[:2] == list(run.seconds)[:2]
    assert found.seconds == pytest.approx(sum(found.stages.values()))
    assert found.stages["read"] == scan.seconds["read"] and all(seconds > 0 for seconds in found.stages.values())
    line = next(line for line in str(found).splitlines() if line.startswith("time: "))
    assert all(name in line for name, seconds in found.stages.items() if seconds >= 0.05)


@pytest.mark.parametrize("few", [True, False])
def test_a_precision_that_is_not_worth_its_trial_is_not_tried_for_a_plan_either(few, models, monkeypatch):
    """Else a plan would be of another precision than the run."""
    scan, chosen = models.own.read((tiny.ct(), tiny.LPS)), []
    monkeypatch.setattr(segmenter, "WORTH_A_CHOICE", 10**6 if few else 0)
    monkeypatch.setattr(models.own.runner, "wanted", "auto")
    monkeypatch.setattr(models.own.runner, "choose", lambda example, warnings: chosen.append(example is None))
    for step in (models.own.plan, models.own.segment):
        step(scan)
        assert set(chosen) == {few}
        chosen.clear()


def test_with_a_limit_the_plan_itself_takes_time(models, monkeypatch):
    scan = models.own.read((tiny.ct(), tiny.LPS))
    assert "plan" not in models.own.plan(scan).stages
    monkeypatch.setattr(models.own, "max_ram", 10**12)
    found, run = models.own.plan(scan), models.own.segment(scan)
    assert found.stages["plan"] > 0 and run.seconds["plan"] > 0


def test_a_scan_whose_axes_are_oblique_to_the_networks_cannot_be_planned(models, monkeypatch):
    """It is carried out as it stands, every class at every voxel."""

    def refuse(*_):
        raise ValueError("oblique")

    monkeypatch.setattr("medseg3d.recipe.Recipe.maps", refuse)
    with pytest.raises(ValueError, match="cannot be planned"):
        models.own.plan(models.own.read((tiny.ct(), tiny.LPS)))


def test_a_bundle_that_is_carried_out_as_it_stands_cannot_be_planned(models, monkeypatch):
    monkeypatch.setattr(models.own, "postprocessing", lambda data: data)
    with pytest.raises(ValueError, match=r"own_ct_unet .* is carried out as it stands, and cannot be planned"):
        models.own.plan(models.own.read((tiny.ct(), tiny.LPS)))


def test_the_arguments_of_a_plan_come_from_the_scan(models):
    """``make_plan`` gets the shape of the scan, not that of the network's grid."""
    seen = SimpleNamespace(shape=None)
    scan = models.own.read((tiny.ct(), tiny.LPS))

    def record(strategy, order, image, target, *rest):
        seen.shape = tuple(target)
        return Plan(strategy, order, 1, 1.0, 1, 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("medseg3d.segmenter.make_plan", record)
        models.own.plan(scan)
    assert seen.shape == tiny.SHAPE and isinstance(scan.volume, ms.Volume)


def test_a_map_of_uncertainty_counts(models, monkeypatch):
    """Its memory, float16 on the network's grid and float32 on the scan's, and the time of its file."""
    monkeypatch.setattr(planning, "current_memory", lambda: 0)
    scan = models.own.read((tiny.ct(), tiny.LPS))
    kept = []
    monkeypatch.setattr(segmenter, "make_plan", lambda *arguments: (kept.append(arguments), make_plan(*arguments))[1])
    without = models.own.plan(scan)
    monkeypatch.setattr(models.own, "uncertainty", "entropy")
    found = models.own.plan(scan)
    image_voxels = kept[0][2][0, 0].numel()
    assert [arguments[-1] for arguments in kept] == [0, 2 * image_voxels + 4 * scan.volume.array.size]
    assert set(found.stages) == set(without.stages)

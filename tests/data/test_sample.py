"""The sample CT that ships, and the pieces of the script that made it."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest
import SimpleITK as sitk

from medseg3d.data.manifest import load_manifest
from medseg3d.data.sample import sample_ct, sample_labels
from medseg3d.io import read_label_table, read_volume
from medseg3d.volume import Volume
from tests.conftest import ROOT

MANIFEST = load_manifest("openkbp_headneck")
# label: (mean ml of the training cases with all organs, least and most median HU)
ORGANS = {
    1: (27.6, 20, 60),
    2: (29.8, 0, 70),
    3: (26.9, -60, 60),
    4: (27.8, -60, 60),
    5: (11.1, 0, 70),
    6: (23.9, -100, 110),
    7: (58.7, 250, 1200),
}


@pytest.fixture(scope="module")
def ct() -> Volume:
    return read_volume(sample_ct())


@pytest.fixture(scope="module")
def labels() -> Volume:
    return read_volume(sample_labels())


class TestFiles:
    def test_one_grid(self, ct, labels):
        assert ct.geometry.same_as(labels.geometry)
        assert (ct.dtype, labels.dtype) == (np.int16, np.uint8)
        assert ct.orientation == "LPS"
        assert ct.header["units"] == "mm"
        assert ct.header["sform_code"] == ct.header["qform_code"] == 2
        assert ct.header["notes"] == labels.header["notes"] == ()

    def test_small_enough_for_a_package(self):
        assert sample_ct().stat().st_size + sample_labels().stat().st_size < 3_500_000

    def test_a_head_and_neck_in_air(self, ct):
        assert ct.array.min() == -1000
        assert 900 <= ct.array.max() <= 3071
        for axis in (0, 1):
            assert (np.take(ct.array, (0, -1), axis) == -1000).all()
        litres = (ct.array > -300).sum() * ct.geometry.voxel_volume / 1e6
        assert 8 < litres < 30
        assert ct.shape[2] * ct.spacing[2] > 250

    @pytest.mark.parametrize("label", ORGANS)
    def test_organ(self, ct, labels, label):
        mean, low, high = ORGANS[label]
        inside = labels.array == label
        assert inside.sum() * labels.geometry.voxel_volume / 1000 == pytest.approx(mean, rel=0.25)
        assert low <= np.median(ct.array[inside]) <= high

    def test_labels_are_those_of_the_manifest(self, labels):
        assert np.unique(labels.array).tolist() == [0, *ORGANS]
        table = read_label_table(sample_labels())
        assert {str(label): name for label, name in table.names.items()} | {"0": "background"} == MANIFEST["labels"]

    def test_sides_of_the_patient(self, labels):
        """World coordinates are RAS+: the first grows towards the patient's right, the last towards the head."""
        at = {n: labels.geometry.world(np.argwhere(labels.array == n)).mean(0) for n in ORGANS}
        assert at[4][0] + 60 < at[7][0] + 30 < at[3][0]
        assert at[5][2] < at[6][2] < at[7][2] < at[1][2]
        assert at[2][1] < at[6][1]

    def test_readme_names_training_patients_only(self):
        named = set(re.findall(r"\bpt\d+\b", (sample_ct().parent / "README.md").read_text()))
        allowed = {c["patient"] for c in MANIFEST["cases"] if c["split"] == "train" and len(c["contoured"]) == 7}
        assert len(named) >= 12
        assert named <= allowed


def test_importing_the_sample_needs_the_standard_library_only():
    code = "import sys, medseg3d.data.sample; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("make_sample_ct")


def turned(degrees: float, scale: float, shift: tuple[float, float, float]) -> np.ndarray:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    result = np.eye(4)
    result[:3, :3] = scale * np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    result[:3, 3] = shift
    return result


class TestPieces:
    def test_similarity_is_found(self, script):
        points = np.random.default_rng(0).normal(size=(5, 3)) * 50
        truth = turned(20, 1.2, (5, -8, 30))
        found = script.similarity(points, points @ truth[:3, :3].T + truth[:3, 3])
        np.testing.assert_allclose(found, truth, atol=1e-9)

    def test_similarity_never_mirrors(self, script):
        points = np.random.default_rng(1).normal(size=(5, 3))
        found = script.similarity(points, points * (-1, 1, 1))
        assert np.linalg.det(found[:3, :3]) > 0

    def test_robust_mean(self, script):
        unknown = script.UNKNOWN
        values = np.array([[10, 7, unknown], [900, unknown, unknown], [20, 9, unknown], [30, unknown, unknown]])
        values = np.vstack([values, [[-500, unknown, unknown]]]).astype(np.int16)
        np.testing.assert_allclose(script.robust_mean(values), [20, 8, -1000])  # trimmed at both ends; two values; none

    def test_fields_follow_each_other(self, script):
        total = script.composed(field((3, 0, -2)), field((1, 4, 0)))
        np.testing.assert_allclose(sitk.GetArrayFromImage(total).reshape(-1, 3), np.tile((4, 4, -2), (1000, 1)))

    def test_recentred_fields_have_no_mean(self, script):
        cases = [
            script.Case("", None, None, None, None, np.eye(4), field(shift)) for shift in ((1.2, 0, 0), (0.4, 0.8, 0))
        ]
        script.recentre(cases)
        middle = [sitk.GetArrayFromImage(case.field)[5, 5, 5] for case in cases]
        np.testing.assert_allclose(middle, [(0.4, -0.4, 0), (-0.4, 0.4, 0)], atol=0.02)

    def test_arguments_out_of_range(self, script, tmp_path, capsys):
        for wrong in (["--cases", "1"], ["--rounds", "9"]):
            with pytest.raises(SystemExit):
                script.main(["--dataset-dir", str(tmp_path), "--output-dir", str(tmp_path), *wrong])
            assert "got" in capsys.readouterr().err

    def test_too_many_cases(self, script, tmp_path):
        cases = [script.read_case(phantom(tmp_path, "one", 1.0))]
        with pytest.raises(ValueError, match="at most 0"):  # a phantom shows no chest
            script.choose(cases, 2)


def field(shift: tuple[float, float, float]) -> sitk.Image:
    return sitk.GetImageFromArray(np.broadcast_to(np.array(shift, float), (10, 10, 10, 3)).copy(), isVector=True)


class Ball(NamedTuple):
    centre: tuple[float, float, float]  # mm, LPS
    radius: float
    hu: int


BODY = Ball((0, 0, 0), 85, 20)
BALLS = {
    1: Ball((0, 20, 45), 20, 60),
    2: Ball((0, 45, -25), 16, 0),
    3: Ball((-50, 0, 15), 18, -60),
    4: Ball((50, 0, 15), 18, -60),
    5: Ball((0, 10, -60), 14, 90),
    6: Ball((0, -30, -45), 18, 150),
    7: Ball((0, -50, 5), 20, 800),
}


def phantom(folder, name: str, scale: float) -> dict[str, str]:
    """A ball with balls in it, on a grid of 5 mm; paths as `datalist` gives them."""
    axis = np.arange(-20, 21) * 5.0
    z, y, x = np.meshgrid(axis, axis, axis, indexing="ij")
    ct, marked = np.full(x.shape, -1000, np.int16), np.zeros(x.shape, np.uint8)
    for label, (centre, radius, hu) in {0: BODY, **BALLS}.items():
        inside = sum((v / scale - c) ** 2 for v, c in zip((x, y, z), centre, strict=True)) < radius**2
        ct[inside], marked[inside] = hu, label
    paths = {"case": name, "image": str(folder / f"{name}_ct.nii.gz"), "label": str(folder / f"{name}_oar.nii.gz")}
    for array, path in ((ct, paths["image"]), (marked, paths["label"])):
        image = sitk.GetImageFromArray(array)
        image.SetOrigin([-100.0] * 3)
        image.SetSpacing([5.0] * 3)
        sitk.WriteImage(image, path)
    return paths


def test_template_of_two_phantoms(script, tmp_path, monkeypatch):
    """A small and a large phantom: the template lies between them, and right stays right."""
    monkeypatch.setattr(script, "SPACING", (4.0, 4.0, 4.0))
    monkeypatch.setattr(script, "AROUND", 20.0)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    cases = [script.read_case(phantom(tmp_path, name, scale)) for name, scale in (("small", 0.92), ("large", 1.08))]
    script.register(cases, rounds=1)
    grid = script.grid_of(*script.box(cases), script.SPACING)
    marked, body = script.vote(cases, grid, list(BALLS))
    hu = script.average_ct(cases, grid, body)
    script.write(tmp_path, *script.cropped(grid, hu, marked, body), script.LabelTable({n: str(n) for n in BALLS}))

    ct = read_volume(tmp_path / "headneck_template_ct.nii.gz")
    labels = read_volume(tmp_path / "headneck_template_seg.nii.gz")
    assert ct.geometry.same_as(labels.geometry)
    assert ct.array.min() == -1000
    radius = ((ct.array > -300).sum() * ct.geometry.voxel_volume * 3 / 4 / np.pi) ** (1 / 3)
    assert radius == pytest.approx(BODY.radius, abs=4)
    centre = labels.geometry.world(np.argwhere(labels.array == 7)).mean(0)
    for label, ball in BALLS.items():
        inside = labels.array == label
        away = labels.geometry.world(np.argwhere(inside)).mean(0) - centre
        truth = (np.array(ball.centre) - BALLS[7].centre) * (-1, -1, 1)  # LPS to RAS
        np.testing.assert_allclose(away, truth, atol=5)
        assert np.median(ct.array[inside]) == pytest.approx(ball.hu, abs=30)

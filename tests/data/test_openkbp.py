"""scripts/convert_openkbp.py: the challenge's CSV files become the manifest's NIfTI files."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medseg3d.data.manifest import load_manifest

MANIFEST = load_manifest("openkbp_headneck")
NUMBER = {name: int(number) for number, name in MANIFEST["labels"].items()}
CASE = next(case for case in MANIFEST["cases"] if case["patient"] == "pt265")
# Some lines of the challenge's files of that patient: flat index and value of ct.csv, and indices of Esophagus.csv.
CT = {548640: 304, 565300: 1270, 581811: 2973, 614169: 1442, 614450: 4546, 630430: 1007, 630707: 20198, 646571: 1219}
ESOPHAGUS = [974797, 991181, 1007568, 1089753, 1122265, 1138399, 1154913, 1187943]


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("convert_openkbp")


@pytest.fixture
def original(shared):
    """The converted CT and organs of the case."""
    return [nib.load(shared("data", CASE[kind])) for kind in ("image", "label")]


def clone(folder: Path, ct: dict[int, int], organs: dict[str, list[int]], spacing=(3.906, 3.906, 2.5)) -> Path:
    case = folder / "provided-data" / "test-pats" / "pt_265"
    case.mkdir(parents=True)
    (case / "voxel_dimensions.csv").write_text("".join(f"{step:.18e}\n" for step in spacing))
    (case / "ct.csv").write_text(",data\n" + "".join(f"{index},{value:.1f}\n" for index, value in ct.items()))
    for name, indices in organs.items():
        (case / f"{name}.csv").write_text(",data\n" + "".join(f"{index},\n" for index in indices))
    return folder


def test_lines_of_the_challenge_lie_where_they_belong(script, original, tmp_path):
    source = clone(tmp_path / "open-kbp", CT, {"Esophagus": ESOPHAGUS})
    assert not script.convert_case(CASE, MANIFEST["labels"], source, tmp_path)  # lines are missing
    ct, organs = (nib.load(tmp_path / CASE[kind]) for kind in ("image", "label"))
    there, known = (np.asarray(image.dataobj) for image in (ct, original[0]))
    assert (there != -1000).sum() == len(CT)
    assert (there == known)[there != -1000].all()
    assert there.max() == 3095  # a filling of 20198
    esophagus = np.asarray(organs.dataobj) == 5
    assert esophagus.sum() == len(ESOPHAGUS)
    assert (np.asarray(original[1].dataobj)[esophagus] == 5).all()
    np.testing.assert_array_equal(ct.affine, original[0].affine)


def test_a_whole_case_has_the_checksums_of_the_manifest(script, original, tmp_path):
    ct, organs = (np.asarray(image.dataobj) for image in original)
    index = np.fromfunction(lambda x, y, z: y * 128 * 128 + x * 128 + 127 - z, ct.shape, dtype=int)
    body = ct > -1000
    values = dict(zip(index[body].tolist(), (ct[body] + 1000).tolist(), strict=True))
    indices = {name: index[organs == NUMBER[organ]].tolist() for organ, name in script.FILES.items()}
    indices["Brainstem"].append(indices["SpinalCord"][0])  # an overlap: the lower number stays
    source = clone(tmp_path / "open-kbp", values, indices)
    assert not script.convert_case(CASE, MANIFEST["labels"], source, tmp_path / "overlap")
    indices["Brainstem"].pop()
    indices["SpinalCord"].append(indices["Brainstem"][0])
    source = clone(tmp_path / "second", values, indices)
    assert script.convert_case(CASE, MANIFEST["labels"], source, tmp_path)
    assert script.convert_case(CASE, MANIFEST["labels"], tmp_path / "gone", tmp_path)  # there already


def test_what_is_no_clone_is_told(script, tmp_path):
    with pytest.raises(SystemExit, match=r"ct\.csv is missing: the first argument is a whole clone"):
        script.convert_case(CASE, MANIFEST["labels"], tmp_path, tmp_path)

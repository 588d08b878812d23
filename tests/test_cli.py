"""The command line as a stranger meets it: what it does, and what it prints where."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medseg3d import __version__, cli
from medseg3d.io import write_label_map
from medseg3d.volume import Volume
from tests import tiny_bundles as tiny
from tests.command_line import ROOT, finished, names, started

# Light commands


def test_light_commands_import_nothing_heavy(tmp_path):
    scan = tiny.write_ct(tmp_path / "ct.nii.gz")
    commands = [
        ["--help"],
        ["predict", "--help"],
        ["models"],
        ["models", "--json"],
        ["models", "info", "headneck_ct_unet"],
        ["models", "info", "nowhere"],
        ["predict", "-i", str(tmp_path / "nothing"), "-o", str(tmp_path)],
        ["predict", "-i", str(scan), "-o", str(tmp_path), "-m", "nowhere"],
    ]
    code = f"""
from medseg3d.cli import main
for command in {commands!r}:
    try:
        main(command)
    except SystemExit:
        pass
    heavy = {{"torch", "monai", "nibabel", "SimpleITK", "pydicom", "matplotlib"}} & set(sys.modules)
    assert not heavy, (command, heavy)
"""
    returncode, _, err = finished(started(code=code))
    assert returncode == 0, "\n".join(err)


def test_models(run):
    code, out, err = run("models")
    assert (code, err) == (0, []) and any(line.startswith("headneck_ct_unet  ") for line in out)
    assert run("models", "list")[1] == out
    code, out, _ = run("models", "--json")
    (entry,) = (entry for entry in json.loads("\n".join(out)) if entry["name"] == "headneck_ct_unet")
    assert entry["labels"] == 7 and entry["version"] and entry["task"]


def test_models_info(run, bundles):
    code, out, err = run("models", "info", "headneck_ct_unet")
    text = "\n".join(out)
    assert (code, err) == (0, []) and "spinal_cord" in text and "not for clinical decisions" in text
    facts = json.loads("\n".join(run("models", "info", "headneck_ct_unet", "--json")[1]))
    assert facts["labels"]["7"] == "mandible"
    assert "  1  left" in "\n".join(run("models", "info", bundles.zoo)[1])  # reading is no running: no trust needed
    code, out, err = run("models", "info", "lungs")
    assert (code, out) == (1, []) and "unknown model 'lungs'" in err[0] and "headneck_ct_unet" in err[0]


def test_a_name_alone_is_enough_and_one_that_is_close_is_asked_for(run):
    assert run("models", "headneck_ct_unet") == run("models", "info", "headneck_ct_unet")
    code, out, err = run("models", "headneck_ct_unt")
    assert (code, out) == (1, []) and err[0].endswith("; did you mean headneck_ct_unet?")
    assert "did you mean" not in run("models", "lungs")[2][0]


def test_a_closed_pipe_is_no_traceback():
    process = started("models", "info", "headneck_ct_unet", env={"PYTHONUNBUFFERED": ""})
    process.stdout.close()
    process.wait(60)
    assert process.stderr.read() == "" and process.returncode == 1


# predict


def test_one_scan_to_one_file(predict, ct_file, tmp_path):
    code, out, err = predict(ct_file, tmp_path / "seg.nii.gz", "-s", "-p", "-rp")
    written = ["seg.nii.gz", "seg.stats.json", "seg.stats.csv", "seg.preview.png", "seg.run.json"]
    assert (code, err) == (0, [])
    assert out == [str(tmp_path / name) for name in written]
    assert names(tmp_path) == sorted([*written, "seg.labels.json"])
    image = nib.load(tmp_path / "seg.nii.gz")
    np.testing.assert_array_equal(image.affine, nib.load(ct_file).affine)
    assert image.shape == tiny.SHAPE and set(np.unique(image.dataobj)) == {0, 1}
    statistics = json.loads((tmp_path / "seg.stats.json").read_text())
    assert statistics["labels"]["bone"]["volume_ml"] > 10


def test_report(predict, ct_file, tmp_path):
    code, out, _ = predict(ct_file, tmp_path / "out", "--report", tmp_path / "run" / "report.json", "--allow_non_hu")
    assert code == 0 and out[-1] == str(tmp_path / "run" / "report.json")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert {"python", "torch", "monai", "numpy"} <= report["versions"].keys()
    assert report["model"]["name"] == "bone_ct_threshold" and len(report["model"]["weights_sha256"]) == 64
    assert report["device"] == "cpu" and report["threads"] >= 1 and report["peak_memory_mb"] > 50
    assert report["options"] == {
        "allow_non_hu": True,
        "series": None,
        "resume": False,
        "compile": False,
        "strategy": None,
        "overlap": None,
        "mirror": False,
        "crop_body": False,
        "max_ram": None,
        "max_vram": None,
        "precision": "float32",
        "uncertainty": None,
        "weights": None,
    }
    assert set(report["seconds"]) == {"load model", "cases"}
    (case,) = report["cases"]
    assert case["error"] is None and case["grid"]["shape"] == list(tiny.SHAPE)
    assert set(case["seconds"]) == {"read", "preprocess", "network", "labels", "postprocess"}
    assert Path(case["outputs"]["segmentation"]).is_file()


@pytest.mark.parametrize(("kind", "suffix"), [("nifti", ".nii.gz"), ("nrrd", ".seg.nrrd"), ("mha", ".mha")])
def test_output_types(kind, suffix, predict, ct_file, tmp_path):
    code, out, _ = predict(ct_file, tmp_path / "out", "-ot", kind)
    assert (code, out) == (0, [str(tmp_path / "out" / f"ct_seg{suffix}")])


def test_one_corrupt_of_three_and_resume(predict, ct_file, tmp_path):
    scans, out_folder = tmp_path / "scans", tmp_path / "out"
    scans.mkdir()
    for name in "abc":
        shutil.copy(ct_file, scans / f"{name}.nii.gz")
    (scans / "b.nii.gz").write_bytes(ct_file.read_bytes()[:5000])
    (scans / "notes.txt").write_text("not a scan")
    code, out, err = predict(scans, out_folder, "--report")
    assert code == 4
    assert out == [str(out_folder / name) for name in ("a_seg.nii.gz", "c_seg.nii.gz", "run.json")]
    assert len(err) == 3 and err[0].startswith(f"skipped {scans / 'notes.txt'}: ")
    assert err[1].startswith(f"error: {scans / 'b.nii.gz'} ") and err[1].count("b.nii.gz") == 1
    assert err[2] == f"1 of 3 cases failed; see {out_folder / 'failures.csv'}"
    with (out_folder / "failures.csv").open(newline="") as file:
        assert [row["case"] for row in csv.DictReader(file)] == ["b"]
    errors = [case["error"] for case in json.loads((out_folder / "run.json").read_text())["cases"]]
    assert [error is None for error in errors] == [True, False, True]

    before = {name: (out_folder / name).stat().st_mtime_ns for name in ("a_seg.nii.gz", "c_seg.nii.gz")}
    assert predict(scans, out_folder, "--resume")[0] == 4  # still corrupt
    shutil.copy(ct_file, scans / "b.nii.gz")
    code, out, err = predict(scans, out_folder, "--resume")
    assert code == 0 and not (out_folder / "failures.csv").exists()
    assert [line for line in err if "earlier run" in line] == [f"{name}: finished by an earlier run" for name in "ac"]
    assert {name: (out_folder / name).stat().st_mtime_ns for name in before} == before
    assert (out_folder / "b_seg.nii.gz").is_file() and len(out) == 3


@pytest.mark.parametrize("missing", ["nowhere.nii.gz", "nowhere*.nii.gz", "broken-link.nii.gz"])
def test_a_named_input_that_is_not_there_is_a_failure(missing, predict, ct_file, tmp_path):
    (tmp_path / "broken-link.nii.gz").symlink_to(tmp_path / "gone")
    code, out, err = predict([ct_file, tmp_path / missing], tmp_path / "out")
    assert code == 4 and len(out) == 1 and missing in err[0]


def test_several_inputs_of_every_kind(predict, ct_file, tmp_path):
    write_label_map(Volume(np.zeros((4, 4, 4), np.uint8), np.eye(4)), tmp_path / "in" / "old_seg.nii.gz", {})
    for name in ("x.nii.gz", "y.nii.gz", "deep/z.nii.gz"):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        shutil.copy(ct_file, tmp_path / "in" / name)
    code, out, _ = predict([tmp_path / "in", tmp_path / "in" / "deep" / "*.nii.gz", ct_file, ct_file], tmp_path / "out")
    assert code == 0
    assert [Path(line).name for line in out] == [f"{name}_seg.nii.gz" for name in ("x", "y", "z", "ct")]


def test_the_shipped_model_in_a_process_of_its_own(ct_file, tmp_path):
    code, out, err = finished(started("predict", "-i", ct_file, "-o", "seg.nii.gz", "-d", "cpu", cwd=tmp_path))
    assert code == 0 and out == ["seg.nii.gz"]
    assert all(line.startswith("warning: ct: ") for line in err), err
    assert names(tmp_path) == ["seg.labels.json", "seg.nii.gz"]


def test_an_empty_device_of_the_environment_is_none(monkeypatch):
    monkeypatch.setenv("MEDSEG3D_DEVICE", "")
    assert cli._parser().parse_args(["predict", "-i", "a.nii.gz", "-o", "b.nii.gz"]).device == "auto"


@pytest.mark.parametrize("closed", ["stdin", "stdout", "stderr"])
def test_a_stream_may_be_closed(closed, tmp_path):
    """Python gives None for it; schedulers and Windows without a console do that."""
    code = f"sys.{closed} = None\nfrom medseg3d.cli import main\nsys.exit(main())"
    code, out, err = finished(started("models", "-h" if closed == "stdin" else "list", code=code, cwd=tmp_path))
    assert code == 0 and err == [] and bool(out) == (closed != "stdout")


def test_progress_only_at_a_terminal(predict, ct_file, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    _, out, err = predict(ct_file, tmp_path / "out")
    assert "[1/1] ct: network" in "".join(err) and len(out) == 1
    _, _, err = predict(ct_file, tmp_path / "out", "--quiet")
    assert err == []


def test_notes_and_warnings_go_to_stderr(run, bundles, tmp_path, monkeypatch):
    from medseg3d import bundle

    loaded = bundle.load_model(bundles.threshold, "cpu", trust=True)
    loaded.notes = ("UNETR: the argument pos_embed is now called proj_type",)
    monkeypatch.setattr(bundle, "load_model", lambda *arguments, **options: loaded)
    scan = tiny.write_ct(tmp_path / "ct.nii.gz", array=tiny.ct().clip(max=100))
    code, out, err = run("predict", "-i", scan, "-o", tmp_path / "seg.nii.gz")
    assert code == 0 and out == [str(tmp_path / "seg.nii.gz")]
    assert err[0] == "note: UNETR: the argument pos_embed is now called proj_type"
    assert err[-1].startswith("warning: ct: nothing was found")


def test_compile(predict, ct_file, tmp_path, monkeypatch):
    """It reaches PyTorch, and that it cannot be done is told in one line."""
    networks = []

    def compile(network):
        networks.append(network)

        def fail(*arguments):
            raise RuntimeError("no compiler\nanywhere")

        return fail

    monkeypatch.setattr("torch.compile", compile)
    code, out, err = predict(ct_file, tmp_path / "seg.nii.gz", "--compile", "-rp")
    assert code == 0 and out[0] == str(tmp_path / "seg.nii.gz") and len(networks) == 1
    (line,) = err
    assert line.startswith("warning: ct: the network could not be compiled") and line.endswith("no compiler anywhere")
    assert json.loads((tmp_path / "seg.run.json").read_text())["options"]["compile"] is True
    assert predict(ct_file, tmp_path / "again.nii.gz")[0] == 0 and len(networks) == 1


def test_a_tilted_series_as_folder_and_as_zip(predict, shared, tmp_path):
    series = shared("data", "ge-head-tilt-dicom")
    archive = tmp_path / "study.zip"
    with zipfile.ZipFile(archive, "w") as content:
        for path in sorted(series.iterdir()):
            content.write(path, f"study/{path.name}")
    written = []
    for scan in (series, archive):
        code, out, err = predict(scan, tmp_path / scan.stem)
        assert code == 0 and any("gantry tilt of 18.5 degrees" in line for line in err), err
        written.append(np.asarray(nib.load(out[0]).dataobj))
    assert np.count_nonzero(written[0]) > 100_000  # the skull
    np.testing.assert_array_equal(*written)


def test_one_of_two_series_by_its_name(predict, run, shared, tmp_path, ct_file):
    pydicom = pytest.importorskip("pydicom")
    folder = tmp_path / "study"
    shutil.copytree(shared("data", "ge-head-tilt-dicom"), folder)
    for file in sorted(folder.iterdir())[:12]:
        slices = pydicom.dcmread(file)
        slices.SeriesInstanceUID, slices.SeriesDescription = "1.2.3", "delayed"
        slices.SOPInstanceUID += ".1"
        slices.save_as(folder / f"late_{file.name}")
    code, out, err = predict(folder, tmp_path / "out")
    assert code == 0 and any("left out series 'delayed' (CT, 12 images)" in line for line in err), err
    first = nib.load(out[0]).shape
    code, out, err = predict(folder, tmp_path / "out", "--resume", "--series", "delayed")
    assert code == 0 and nib.load(out[0]).shape[2] < first[2], "another series is not what was finished"
    code, _, err = predict(folder, tmp_path / "out", "--series", "early")
    assert code == 1 and "no DICOM series 'early' that makes a volume" in err[-1]
    code, _, err = predict(ct_file, tmp_path / "out", "--series", "delayed")
    assert code == 2 and "--series is for DICOM files" in err[-1]


# Trust


def test_a_foreign_bundle_needs_trust(run, bundles, ct_file, tmp_path):
    code, out, err = run("predict", "-i", ct_file, "-o", tmp_path / "seg.nii.gz", "-m", bundles.zoo)
    assert (code, out, len(err)) == (1, [], 1) and "--trust" in err[0] and names(tmp_path) == []
    code, out, _ = run("predict", "-i", ct_file, "-o", tmp_path / "seg.nii.gz", "-m", bundles.zoo, "--trust")
    assert code == 0 and names(tmp_path) == ["seg.labels.json", "seg.nii.gz"]


@pytest.mark.parametrize(("answer", "code"), [("y\n", 0), ("YES\n", 0), ("\n", 1), ("n\n", 1), ("", 1)])
def test_a_terminal_is_asked(answer, code, run, bundles, ct_file, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdin.readline", lambda: answer, raising=False)
    got, _, err = run("predict", "-i", ct_file, "-o", tmp_path / "seg.nii.gz", "-m", bundles.threshold)
    assert got == code and "Run it? [y/N]" in "".join(err)


def test_python_m_medseg3d():
    done = subprocess.run([sys.executable, "-m", "medseg3d", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == f"medseg3d {__version__}\n"

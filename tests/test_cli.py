"""The command line as a stranger meets it: what it takes, what it prints where, and how it fails."""

from __future__ import annotations

import csv
import errno
import gzip
import json
import logging
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medseg3d import __version__, cli
from medseg3d.io import write_label_map
from medseg3d.volume import Volume
from tests import tiny_bundles as tiny

ROOT = Path(__file__).resolve().parents[1]

EVERY_VERB = {"-h --help", "-q --quiet", "-v --verbose"}
FLAGS = {
    "predict": {
        "-i --input",
        "-o --output",
        "-m --model",
        "-d --device",
        "-s --statistics",
        "-p --preview",
        "-rp --report",
        "-ot --output-type",
        "--resume",
        "--allow-non-hu",
        "--trust",
    },
    "evaluate": {
        "-p --predictions",
        "-r --references",
        "-o --output",
        "--labels",
        "-m --model",
        "--manifest",
        "--nsd-tolerance",
    },
    "train": {"-m --model", "--dataset-dir", "-o --output", "--epochs", "-d --device", "--trust"},
    "models": {"action", "name", "--json"},
    "doctor": {"--json"},
}


@pytest.fixture(autouse=True)
def leave_no_log_level():
    level = logging.getLogger("medseg3d").level
    yield
    logging.getLogger("medseg3d").setLevel(level)


@pytest.fixture
def run(capsys):
    """run("predict", ...) -> (exit code, lines on stdout, lines on stderr)."""

    def run_main(*arguments):
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out.splitlines(), captured.err.splitlines()

    return run_main


@pytest.fixture
def predict(run, bundles):
    """The same for predict with the threshold bundle."""

    def run_predict(scans, output, *options):
        scans = scans if isinstance(scans, list) else [scans]
        return run("predict", "-i", *scans, "-o", output, "-m", bundles.threshold, "--trust", "-d", "cpu", *options)

    return run_predict


def started(*arguments, code="from medseg3d.cli import main\nsys.exit(main())", **options):
    """A process of its own that runs the command line."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | options.pop("env", {})
    command = [*options.pop("prefix", ()), sys.executable, "-c", f"import sys\n{code}", *map(str, arguments)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen(command, env=environment, text=True, **streams)


def finished(process, timeout=120):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out.splitlines(), err.splitlines()


def names(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


# What it takes


def verbs():
    (action,) = cli._parser()._subparsers._group_actions
    return action.choices


def test_verbs_and_flags_are_frozen():
    """A flag that goes or changes its name breaks somebody's script: change this table only on purpose."""
    found = {
        name: {" ".join(action.option_strings) or action.dest for action in verb._actions}
        for name, verb in verbs().items()
    }
    assert found == {name: flags | EVERY_VERB for name, flags in FLAGS.items()}


@pytest.mark.parametrize("verb", FLAGS)
def test_help(verb, run):
    code, out, err = run(verb, "--help")
    assert (code, err) == (0, [])
    text = "\n".join(out)
    flags = {part for flag in FLAGS[verb] | EVERY_VERB for part in flag.split() if part.startswith("-")}
    assert all(flag in text for flag in flags)
    assert all(action.help for action in verbs()[verb]._actions), "everything says what it does"


def test_help_of_all(run):
    code, out, _ = run("--help")
    assert code == 0 and all(any(line.strip().startswith(verb) for line in out) for verb in FLAGS)
    assert "not for clinical decisions" in " ".join(out)
    assert run("--version") == (0, [f"medseg3d {__version__}"], [])


def test_defaults(monkeypatch):
    monkeypatch.delenv("MEDSEG3D_DEVICE", raising=False)
    args = cli._parser().parse_args(["predict", "-i", "a", "-o", "b"])
    assert (args.model, args.device, args.output_type, args.report) == ("headneck_ct_unet", "auto", "nifti", None)
    monkeypatch.setenv("MEDSEG3D_DEVICE", "cpu")
    assert cli._parser().parse_args(["predict", "-i", "a", "-o", "b"]).device == "cpu"


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["--allow_non_hu"], ["--allow-non-hu"]),
        (["--output_type=mha"], ["--output-type=mha"]),
        (["--dataset_dir", "my_data"], ["--dataset-dir", "my_data"]),
        (["--labels=my_labels.json"], ["--labels=my_labels.json"]),
        (["-i", "a_b.nii.gz", "-"], ["-i", "a_b.nii.gz", "-"]),
    ],
)
def test_underscores_are_dashes(given, meant):
    assert cli._with_dashes(given) == meant


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["segment"],
        ["predict"],
        ["predict", "-i", "ct.nii.gz"],
        ["predict", "-i", "ct.nii.gz", "-o", "out", "--fast"],
        ["predict", "-i", "ct.nii.gz", "-o", "out", "-ot", "png"],
        ["models", "info"],
        ["models", "list", "headneck_ct_unet"],
        ["models", "delete"],
        ["evaluate", "-p", "a"],
        ["evaluate", "-p", "a", "-r", "b", "--nsd-tolerance", "two"],
        ["train"],
    ],
)
def test_wrong_usage_is_exit_code_2(arguments, run):
    code, out, err = run(*arguments)
    assert (code, out) == (2, []) and "error: " in err[-1]


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
    assert report["options"] == {"allow_non_hu": True, "resume": False}
    assert set(report["seconds"]) == {"load model", "cases"}
    (case,) = report["cases"]
    assert case["error"] is None and case["grid"]["shape"] == list(tiny.SHAPE)
    assert set(case["seconds"]) == {"read", "preprocess", "network", "postprocess"}
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


# Bad inputs: each file, the words that must be in the one line, the exit code


def raw_nifti():
    return bytearray(nib.Nifti1Image(tiny.ct(), tiny.LPS).to_bytes())


def with_header(*changes):
    raw = raw_nifti()
    for form, offset, *values in changes:
        struct.pack_into(form, raw, offset, *values)
    return bytes(raw)


def with_array(change):
    array = change(tiny.ct().astype(np.float32))
    return gzip.compress(nib.Nifti1Image(array, tiny.LPS).to_bytes(), 1)


def replaced(value):
    def change(array):
        array[3, 4, 5] = value
        return array

    return change


NO_SFORM = ("<2h", 252, 0, 0)
ZERO_SPACING = ("<3f", 80, 4, 0, 4)
SINGULAR = ("<12f", 280, -4, -4, 0, 80, 0, 0, 0, 80, 0, 0, 4, -80)
PARALLEL = ("<12f", 280, 4, 4, 0, 0, 4, 4, 0, 0, 0, 0, 4, 0)
BAD_SCANS = {
    "empty file": ("ct.nii.gz", lambda: b"", "is empty (0 bytes)", 1),
    "empty NRRD": ("ct.nrrd", lambda: b"", "is empty (0 bytes)", 1),
    "truncated gzip": ("ct.nii.gz", lambda: gzip.compress(raw_nifti(), 1)[:9000], "is cut off", 1),
    "truncated header": ("ct.nii", lambda: bytes(raw_nifti()[:200]), "", 1),
    "truncated voxels": ("ct.nii", lambda: bytes(raw_nifti()[:9000]), "", 1),
    "text renamed": ("ct.nii.gz", lambda: b"patient,age\n1,50\n" * 50, "is not a NIfTI file", 1),
    "text renamed to NRRD": ("ct.nrrd", lambda: b"patient,age\n1,50\n" * 50, "cannot be read as .nrrd", 1),
    "gzip of text": ("ct.nii.gz", lambda: gzip.compress(b"patient,age\n" * 50), "is not a NIfTI file", 1),
    "uncompressed .nii.gz": ("ct.nii.gz", lambda: b"\x1f\x8b" + bytes(600), "", 1),
    "NaN": ("ct.nii.gz", lambda: with_array(replaced(np.nan)), "1 of 54720 voxels are NaN or infinite", 1),
    "infinite": ("ct.nii.gz", lambda: with_array(replaced(np.inf)), "1 of 54720 voxels are NaN or infinite", 1),
    "single slice": ("ct.nii.gz", lambda: with_array(lambda a: a[:, :, :1]), "a single slice", 1),
    "constant": ("ct.nii.gz", lambda: with_array(lambda a: np.full_like(a, -1000)), "every voxel is -1000", 1),
    "grey levels": ("ct.nii.gz", lambda: with_array(lambda a: a.clip(0, 255)), "not Hounsfield units", 1),
    "4D": ("ct.nii.gz", lambda: with_array(lambda a: np.stack([a, a], -1)), "has 2 volumes", 1),
    "2D": ("ct.nii.gz", lambda: with_array(lambda a: a[:, :, 3]), "is 2D", 1),
    "zero spacing": ("ct.nii", lambda: with_header(NO_SFORM, ZERO_SPACING), "must be above 0 mm", 1),
    "singular affine": ("ct.nii", lambda: with_header(SINGULAR), "ct.nii", 1),
    "parallel axes": ("ct.nii", lambda: with_header(PARALLEL), "ct.nii", 1),
    "unknown format": ("ct.png", lambda: b"\x89PNG", "not a format that medseg3d reads", 2),
    "empty DICOM": ("ct.dcm", lambda: b"", "not a format that medseg3d reads", 2),
    "zip without DICOM": ("ct.zip", lambda: b"PK\x05\x06" + bytes(18), "not a format that medseg3d reads", 2),
}


@pytest.mark.parametrize("case", BAD_SCANS)
def test_bad_scans(case, predict, tmp_path):
    name, content, words, expected = BAD_SCANS[case]
    scan = tmp_path / name
    scan.write_bytes(content())
    code, out, err = predict(scan, tmp_path / "out" / "seg.nii.gz", "-s", "-p")
    assert (code, out, len(err)) == (expected, [], 1), err
    assert err[0].startswith("error: ") and name in err[0] and words in err[0]
    assert len(err[0]) < 400 + len(str(scan)) and "Traceback" not in err[0] and "Errno" not in err[0]
    assert names(tmp_path) == [name], "nothing but the scan is left"


@pytest.mark.parametrize(
    ("options", "expected", "words"),
    [
        (["-i", "nowhere.nii.gz", "-o", "out"], 2, "nowhere.nii.gz: no such file or folder"),
        (["-i", "*.nrrd", "-o", "out"], 2, "*.nrrd: the pattern matches nothing"),
        (["-i", "empty folder", "-o", "out"], 2, "the folder holds no image file"),
        (["-i", "ct.nii.gz", "-o", "ct.nii.gz"], 2, "the output ct.nii.gz is an input"),
        (["-i", "ct.nii.gz", "again.nii.gz", "-o", "seg.nii.gz"], 2, "2 scans cannot be written to one file"),
        (["-i", "ct.nii.gz", "-o", "seg.mhd"], 2, "cannot write .mhd"),
        (["-i", "ct.nii.gz", "-o", "text"], 1, "cannot make the output folder text (file exists)"),
        (["-i", "ct.nii.gz", "-o", "text/seg.nii.gz"], 1, "cannot make the output folder text"),
        (["-i", "ct.nii.gz", "-o", "out", "-m", "lungs"], 1, "unknown model 'lungs'"),
        (["-i", "ct.nii.gz", "-o", "out", "-m", "text"], 1, "unknown model 'text'"),
        (["-i", "ct.nii.gz", "-o", "out", "-m", "empty folder"], 1, "empty folder is not a MONAI Bundle"),
        (["-i", "ct.nii.gz", "-o", "out", "-d", "tpu"], 1, "unknown device 'tpu'; a device is auto, cpu, gpu"),
        (["-i", "ct.nii.gz", "-o", "out", "-d", "gpu:99"], 1, "device 'gpu:99' is not there"),
    ],
)
def test_bad_options(options, expected, words, run, ct_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty folder").mkdir()
    (tmp_path / "text").write_text("")
    for name in ("ct.nii.gz", "again.nii.gz"):
        shutil.copy(ct_file, name)
    code, out, err = run("predict", *options)
    assert (code, out, len(err)) == (expected, [], 1), err
    assert err[0].startswith("error: ") and words in err[0] and "Errno" not in err[0]
    assert names(tmp_path) == ["again.nii.gz", "ct.nii.gz", "text"]


def test_verbose_shows_the_traceback(run, tmp_path):
    with pytest.raises(ValueError, match="unknown model"):
        cli.main(["models", "info", "lungs", "-v"])


def without_privileges():
    """A prefix for a command that makes permissions count for root too."""
    if os.geteuid() != 0:
        return ()
    if shutil.which("setpriv") is None:
        pytest.skip("root may do everything here, and setpriv is not there to prevent it")
    dropped = "-dac_override,-dac_read_search"
    return ("setpriv", f"--bounding-set={dropped}", f"--inh-caps={dropped}")


@pytest.mark.skipif(os.name != "posix", reason="permissions are those of POSIX")
@pytest.mark.parametrize(
    ("scan", "output", "code", "words"),
    [
        ("closed.nii.gz", "out", 2, "closed.nii.gz: cannot be opened (Permission denied)"),
        ("closed folder", "out", 2, "closed folder: cannot be opened (Permission denied)"),
        ("ct.nii.gz", "read-only", 1, "no permission to write into the output folder"),
        ("ct.nii.gz", "read-only/deeper/seg.nii.gz", 1, "cannot make the output folder"),
    ],
)
def test_no_permission(scan, output, code, words, ct_file, tmp_path):
    for name in ("ct.nii.gz", "closed.nii.gz"):
        shutil.copy(ct_file, tmp_path / name)
    (tmp_path / "closed.nii.gz").chmod(0)
    for name, mode in (("closed folder", 0o000), ("read-only", 0o555)):
        (tmp_path / name).mkdir(mode=mode)
    process = started("predict", "-i", scan, "-o", output, cwd=tmp_path, prefix=without_privileges())
    got, out, err = finished(process)
    assert (got, out, len(err)) == (code, [], 1), err
    assert words in err[0] and "Errno" not in err[0]


def test_a_full_disk(predict, ct_file, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("medseg3d.io.atomic.os.fsync", full)
    code, out, err = predict(ct_file, tmp_path / "seg.nii.gz", "-s")
    assert (code, out, len(err)) == (1, [], 1)
    assert "no space left on device; free some space or choose another folder" in err[0] and "Errno" not in err[0]
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 40.0 GiB for an array"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] not enough memory: you tried to allocate 40 bytes."),
    ],
)
def test_out_of_memory(error, run, bundles, ct_file, tmp_path, monkeypatch):
    from medseg3d import bundle

    def inferer(image, network):
        raise error

    loaded = bundle.load_model(bundles.threshold, "cpu", trust=True)
    loaded.inferer = inferer
    monkeypatch.setattr(bundle, "load_model", lambda *arguments, **options: loaded)
    code, out, err = run("predict", "-i", ct_file, "-o", tmp_path / "seg.nii.gz")
    assert (code, out, len(err)) == (5, [], 1) and "out of memory (" in err[0] and "crop the scan" in err[0]
    shutil.copy(ct_file, tmp_path / "b.nii.gz")
    assert run("predict", "-i", ct_file, tmp_path / "b.nii.gz", "-o", tmp_path / "out")[0] == 4

    monkeypatch.setattr(bundle, "load_model", lambda *arguments, **options: inferer(None, None))
    code, _, err = run("predict", "-i", ct_file, "-o", tmp_path / "seg.nii.gz")
    assert code == 5 and len(err) == 1


@pytest.mark.skipif(os.name != "posix", reason="signals are those of POSIX")
def test_ctrl_c_while_the_network_runs(ct_file, tmp_path):
    """A bundle in a zip whose strategy says that it has begun and then takes its time."""
    folder = tmp_path / "slow_bundle"
    (folder / "scripts").mkdir(parents=True)
    (folder / "scripts" / "__init__.py").write_text("")
    (folder / "scripts" / "slow.py").write_text(
        "import os, time\n"
        "class Slow:\n"
        "    def __call__(self, image, network):\n"
        "        open(os.environ['BEGUN'], 'w').close()\n"
        "        time.sleep(60)\n"
    )
    tiny.write_zoo_bundle(folder, edit=lambda config: config.update(inferer={"_target_": "scripts.slow.Slow"}))
    archive = tiny.zipped(folder, tmp_path / "slow.zip")
    begun, scratch, out = (tmp_path / name for name in ("begun", "scratch", "out"))
    scratch.mkdir()
    process = started(
        *("predict", "-i", ct_file, "-o", out, "-m", archive, "--trust", "-s", "-p", "-d", "cpu"),
        env={"BEGUN": str(begun), "TMPDIR": str(scratch)},
    )
    try:
        for _ in range(1200):
            if begun.exists() or process.poll() is not None:
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        code, lines, err = finished(process)
    finally:
        process.kill()
    assert (code, lines) == (130, []) and err == ["interrupted; nothing half-written was left"]
    assert names(out) == [] and list(scratch.glob("medseg3d-*")) == []


# evaluate and train


def references(folder, name="ct", label=1):
    array = np.zeros(tiny.SHAPE, np.uint8)
    array[tiny.bone()] = label
    return write_label_map(Volume(array, tiny.LPS), folder / f"{name}.nii.gz", {label: "bone"})


def test_evaluate_what_predict_wrote(predict, run, ct_file, tmp_path):
    """The folder holds previews, statistics and reports too; the names come with the segmentations."""
    predict(ct_file, tmp_path / "out", "-s", "-p", "-rp")
    references(tmp_path / "truth")
    code, out, err = run("evaluate", "-p", tmp_path / "out", "-r", tmp_path / "truth", "-o", tmp_path / "scores.csv")
    assert code == 0, err
    (row,) = (line.split() for line in out if line.startswith("bone"))
    assert float(row[3]) > 0.98
    assert out[-1] == str(tmp_path / "scores.csv")
    with (tmp_path / "scores.csv").open(newline="") as file:
        (scores,) = csv.DictReader(file)
    assert scores["label"] == "bone" or scores["name"] == "bone"


def test_evaluate_takes_names_from_elsewhere(run, tmp_path, bundles):
    truth = references(tmp_path / "truth")
    nib.save(nib.Nifti1Image(np.asarray(nib.load(truth).dataobj), tiny.LPS), tmp_path / "plain.nii.gz")
    (tmp_path / "names.json").write_text('{"1": "femur"}')
    pair = ("-p", tmp_path / "plain.nii.gz", "-r", truth)
    code, out, err = run("evaluate", *pair)
    assert (code, out) == (2, []) and "--labels names.json or -m MODEL" in err[0]
    assert any(line.startswith("femur") for line in run("evaluate", *pair, "--labels", tmp_path / "names.json")[1])
    assert any(line.startswith("bone") for line in run("evaluate", *pair, "-m", bundles.threshold)[1])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-p", "nowhere", "-r", "truth"], "no such file or folder: nowhere"),
        (["-p", "truth", "-r", "nowhere"], "no such file or folder: nowhere"),
        (["-p", "truth", "-r", "truth", "--labels", "nowhere.json"], "nowhere.json"),
        (["-p", "truth", "-r", "truth", "-m", "lungs"], "unknown model 'lungs'"),
        (["-p", "truth", "-r", "truth", "--manifest", "nowhere"], "there is no manifest 'nowhere'"),
    ],
)
def test_evaluate_says_what_is_wrong(arguments, words, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    references(tmp_path / "truth")
    code, out, err = run("evaluate", *arguments)
    assert (code, out, len(err)) == (1, [], 1) and words in err[0] and "Errno" not in err[0]


def test_train_prints_the_checkpoint_and_nothing_else(run, tmp_path, monkeypatch):
    from medseg3d.training import run as training

    calls = []

    def train_bundle(*arguments):
        calls.append(arguments)
        print("the log of MONAI")
        return tmp_path / "best.pt"

    monkeypatch.setattr(training, "train_bundle", train_bundle)
    code, out, err = run("train", "--dataset_dir", "data", "-o", "out", "--epochs", "3", "-d", "cpu", "-q")
    assert (code, out, err) == (0, [str(tmp_path / "best.pt")], ["the log of MONAI"])
    ((bundle, *rest),) = calls
    assert bundle.name == "headneck_ct_unet" and rest == ["data", "out", "cpu", 3, False]


def test_train_says_what_is_wrong(run, bundles, tmp_path):
    code, out, err = run("train", "--dataset-dir", tmp_path / "nowhere", "-o", tmp_path)
    assert (code, out, len(err)) == (1, [], 1) and "nowhere does not exist" in err[0]
    code, _, err = run("train", "--dataset-dir", tmp_path, "-o", tmp_path, "-m", bundles.zoo)
    assert code == 2 and "--trust" in err[0]
    code, _, err = run("train", "--dataset-dir", tmp_path, "-o", tmp_path, "-m", bundles.zoo, "--trust")
    assert code == 1 and "has no configs/train.json" in err[0]
    code, out, err = run("train", "--dataset-dir", tmp_path, "-o", tmp_path / "out", "-q")
    assert (code, out) == (1, []) and "is not in the dataset folder" in err[-1]


# Real DICOM


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


def test_python_m_medseg3d():
    done = subprocess.run([sys.executable, "-m", "medseg3d", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == f"medseg3d {__version__}\n"

"""The command line when something is wrong: one line that helps, an exit code, and nothing half-written."""

from __future__ import annotations

import errno
import gzip
import os
import shutil
import signal
import struct
import time

import nibabel as nib
import numpy as np
import pytest

from medseg3d.cli import verbs
from tests import tiny_bundles as tiny
from tests.command_line import finished, names, started

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
    "unknown format": ("ct.xyz", lambda: b"xyz", "not a format that medseg3d reads", 2),
    "picture": ("ct.png", lambda: b"\x89PNG", "a picture, but the model segments scans", 2),
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
        (["-i", "ct.nii.gz", "-o", "seg.mha", "--resume"], 2, "seg.mha cannot be resumed: name a folder"),
        (["-i", "ct.nii.gz", "-o", "seg.mhd"], 2, "cannot write .mhd"),
        (["-i", "ct.nii.gz", "-o", "text"], 1, "cannot make the output folder text (file exists)"),
        (["-i", "ct.nii.gz", "-o", "text/seg.nii.gz"], 1, "cannot make the output folder text"),
        (["-i", "ct.nii.gz", "-o", "out", "-m", "lungs"], 1, "unknown model 'lungs'"),
        (["-i", "ct.nii.gz", "-o", "out", "-m", "text"], 1, "unknown model 'text'"),
        (["-i", "ct.nii.gz", "-o", "out", "-m", "empty folder"], 1, "empty folder is not a MONAI Bundle"),
        (["-i", "ct.nii.gz", "-o", "out", "-d", "tpu"], 1, "unknown device 'tpu'; a device is auto, cpu, gpu"),
        (["-i", "ct.nii.gz", "-o", "out", "-d", "gpu:99"], 1, "device 'gpu:99' is not there"),
        (["-i", "ct.nii.gz", "-o", "out", "--report", "ct.nii.gz"], 2, "cannot go to ct.nii.gz, it is an input"),
        (["-i", "ct.nii.gz", "-o", "s.nii.gz", "--report", "s.nii.gz"], 2, "another output of the run goes there"),
        (["-i", "ct.nii.gz", "-o", "s.mha", "-s", "--report", "s.stats.json"], 2, "another output of the run"),
        (["-i", "ct.nii.gz", "-o", "out", "--report", "out/finished.json"], 2, "another output of the run"),
        (["-i", "ct.nii.gz", "-o", "s.nii.gz", "--report", "s.labels.json"], 2, "another output of the run"),
        (["-i", "ct.nii.gz", "-o", "out", "--report", "new.mha"], 2, ".mha is the suffix of an image"),
        (["-i", "ct.nii.gz", "-o", "out", "--report", "slice0001"], 2, "what lies there is no report"),
        (["-i", "ct.nii.gz", "-o", "out", "--report", "empty folder"], 2, "what lies there is no report"),
        (["-i", "ct.nii.gz", "-o", "out", "--report", "text/run.json"], 1, "no file can be made in"),
    ],
)
def test_bad_options(options, expected, words, run, ct_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty folder").mkdir()
    (tmp_path / "text").write_text("")
    (tmp_path / "slice0001").write_bytes(bytes(128) + b"DICM")
    for name in ("ct.nii.gz", "again.nii.gz"):
        shutil.copy(ct_file, name)
    code, out, err = run("predict", *options)
    assert (code, out, len(err)) == (expected, [], 1), err
    assert err[0].startswith("error: ") and words in err[0] and "Errno" not in err[0]
    assert names(tmp_path) == ["again.nii.gz", "ct.nii.gz", "slice0001", "text"]


def test_verbose_shows_the_traceback(run):
    code, out, err = run("models", "info", "lungs", "-v")
    assert (code, out) == (1, []) and err[0].startswith("Traceback") and err[-1].startswith("error: unknown model")


def test_verbose_keeps_the_exit_code_of_memory(run, monkeypatch):
    def fails(*_):
        raise MemoryError

    monkeypatch.setattr(verbs, "find_bundle", fails)
    assert [run("train", "--dataset-dir", ".", "-o", "out", *more)[0] for more in ((), ("-v",))] == [5, 5]


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

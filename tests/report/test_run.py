from __future__ import annotations

import hashlib
import json
import platform

import numpy as np
import pytest

from medseg3d.geometry import Geometry
from medseg3d.report import run
from medseg3d.report.run import (
    Stopwatch,
    bundle_sha256,
    case_record,
    model_record,
    peak_memory_mb,
    run_report,
    versions,
    write_run_report,
)


@pytest.fixture
def bundle(tmp_path):
    folder = tmp_path / "some_bundle"
    for name, content in {
        "configs/metadata.json": "{}",
        "models/model.pt": "weights",
        "docs/README.md": "text",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def test_stages_add_up_and_keep_their_order(monkeypatch):
    clock = iter([0.0, 1.0, 5.0, 7.0, 10.0, 10.5])
    monkeypatch.setattr(run.time, "perf_counter", lambda: next(clock))
    stopwatch = Stopwatch()
    with stopwatch.stage("read"):
        pass
    with pytest.raises(KeyError), stopwatch.stage("network"):
        raise KeyError
    with stopwatch.stage("read"):
        pass
    assert stopwatch.seconds == {"read": 1.5, "network": 2.0}
    assert list(stopwatch.seconds) == ["read", "network"]


def test_versions_name_what_is_installed(monkeypatch):
    found = versions()
    assert found["python"] == platform.python_version()
    assert found["numpy"] == np.__version__
    monkeypatch.setattr(run, "_PACKAGES", ("no_such_package_here",))
    assert versions()["no_such_package_here"] is None


def test_bundle_hash_follows_what_decides_its_results(bundle):
    first = bundle_sha256(bundle)
    (bundle / "docs" / "README.md").write_text("other text")
    (bundle / "configs" / "cache.pyc").write_text("compiled")
    assert bundle_sha256(bundle) == first
    (bundle / "models" / "model.pt").write_text("other weights")
    second = bundle_sha256(bundle)
    (bundle / "models" / "model.pt").rename(bundle / "models" / "renamed.pt")
    assert len({first, second, bundle_sha256(bundle)}) == 3


def test_peak_memory_is_that_of_this_process():
    before = peak_memory_mb()
    block = np.ones(64 << 20, np.uint8)
    assert peak_memory_mb() >= max(before, block.nbytes / (1 << 20))


def test_report_is_complete_and_written_as_given(bundle, tmp_path):
    geometry = Geometry((4, 5, 6), np.diag([-1.0, -1.0, 2.5, 1.0]))
    done = case_record(
        "pt1", "scans/pt1.nii.gz", geometry, {"segmentation": "out/pt1_seg.nii.gz"}, {"read": 0.12345}, ["x"]
    )
    failed = case_record("pt2", "scans/pt2.nii.gz", error="the file is truncated")
    model = model_record("headneck", "0.1.0", bundle, bundle / "models" / "model.pt")
    report = run_report(model, [done, failed], "cpu", threads=2, options={"overlap": 0.5}, seconds={"load": 1.0})
    path = write_run_report(tmp_path / "run.json", report)
    read = json.loads(path.read_text())
    assert read == report
    assert read["model"]["weights_sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert read["model"]["version"] == "0.1.0"
    assert read["cases"][0] == {
        "name": "pt1",
        "input": "scans/pt1.nii.gz",
        "grid": {"shape": [4, 5, 6], "spacing_mm": [1, 1, 2.5], "orientation": "LPS", "origin_mm": [0, 0, 0]},
        "outputs": {"segmentation": "out/pt1_seg.nii.gz"},
        "seconds": {"read": 0.123},
        "warnings": ["x"],
        "error": None,
    }
    assert (read["cases"][1]["grid"], read["cases"][1]["error"]) == (None, "the file is truncated")
    assert read["seconds"] == {"load": 1.0}
    assert read["peak_memory_mb"] > 0


def test_json_refuses_what_json_does_not_know(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_run_report(tmp_path / "run.json", {"dice": float("nan")})
    assert not list(tmp_path.iterdir())

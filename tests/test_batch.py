"""Many scans, one model: names, failures that stop nobody else, and runs that are taken up again."""

from __future__ import annotations

import csv
import errno
import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch

from medseg3d.batch import predict_many
from medseg3d.io import find_inputs
from medseg3d.outputs import OutputPlan
from tests import tiny_bundles as tiny
from tests.command_line import names


@pytest.fixture
def model(models):
    return models.threshold


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def counted(model, monkeypatch):
    """The names of the files that reach the model from now on."""
    seen, read = [], model.read

    def spy(image, *arguments, **options):
        seen.append(image.name)
        return read(image, *arguments, **options)

    monkeypatch.setattr(model, "read", spy)
    return seen


# What is written


def test_a_folder(model, scans, tmp_path):
    plan = OutputPlan(tmp_path / "out", statistics=True, preview=True)
    results = list(predict_many(model, scans, plan))
    assert [result.case.name for result in results] == ["a", "b", "c"]
    assert [result.error is None for result in results] == [True, False, True]
    assert "cut off" in results[1].error and "\n" not in results[1].error
    files = [
        f"{name}{end}" for name in "ac" for end in (".preview.png", ".stats.json", "_seg.labels.json", "_seg.nii.gz")
    ]
    assert names(plan.folder) == sorted([*files, "failures.csv", "finished.json", "statistics.csv"])
    assert rows(plan.folder / "failures.csv") == [
        {"case": "b", "input": str(scans / "b.nii.gz"), "error": results[1].error}
    ]
    assert {row["case"] for row in rows(plan.folder / "statistics.csv")} == {"a", "c"}
    for result in (results[0], results[2]):
        assert all(path.is_file() for path in result.outputs.values())
        written = np.asarray(nib.load(result.outputs["segmentation"]).dataobj)
        np.testing.assert_array_equal(written, result.result.segmentation.array)
    assert results[0].record()["grid"]["shape"] == list(tiny.SHAPE)
    assert results[1].record()["error"] == results[1].error and results[1].record()["grid"] is None


@pytest.mark.parametrize("name", ["seg.nii.gz", "seg.nii", "seg.nrrd", "seg.seg.nrrd", "seg.mha"])
def test_a_file(name, model, ct_file, tmp_path):
    plan = OutputPlan(tmp_path / "new folder" / name, statistics=True, preview=True)
    (result,) = predict_many(model, [ct_file], plan)
    assert result.error is None and result.outputs["segmentation"] == plan.target
    stem = name.partition(".")[0]
    side_files = [f"{stem}.labels.json", f"{stem}.preview.png", f"{stem}.stats.csv", f"{stem}.stats.json"]
    assert names(plan.folder) == sorted([name, *side_files])
    assert plan.report == plan.folder / f"{stem}.run.json"


@pytest.mark.parametrize("suffix", [".nii.gz", ".seg.nrrd", ".mha"])
def test_formats_in_a_folder(suffix, model, ct_file, tmp_path):
    (result,) = predict_many(model, ct_file, OutputPlan(tmp_path / "out", suffix))
    assert result.outputs["segmentation"] == tmp_path / "out" / f"ct_seg{suffix}"
    assert result.outputs["segmentation"].is_file()


def test_through_the_segmenter(model, scans, tmp_path):
    stages = []
    results = model.predict_many(
        [scans / "a.nii.gz"], tmp_path / "out", progress=lambda case, stage: stages.append((case.name, stage))
    )
    assert [result.result.labels for result in results] == [{1: "bone"}]
    assert {name for name, _ in stages} == {"a"}
    order = [stage for _, stage in stages]
    assert order[:2] == ["read", "preprocess"] and order[-2:] == ["postprocess", "write"] and "network" in order


def test_the_home_folder_of_a_user(model, ct_file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (result,) = model.predict_many(ct_file, "~/out")
    assert result.outputs["segmentation"] == tmp_path / "out" / "ct_seg.nii.gz"


def test_cases_come_one_by_one(model, scans, tmp_path):
    """The first result is on disk before the second case is begun, where that is asked for."""
    results = predict_many(model, scans, tmp_path / "out", background_io=False)
    next(results)
    assert "a_seg.nii.gz" in names(tmp_path / "out") and "c_seg.nii.gz" not in names(tmp_path / "out")


# What is refused before any time is spent


@pytest.mark.parametrize(
    ("inputs", "target", "reason"),
    [
        (["scans/a.nii.gz", "scans/c.nii.gz"], "seg.nii.gz", "2 scans cannot be written to one file.*name a folder"),
        (["scans/a.nii.gz"], "scans/a.nii.gz", "is an input"),
        (["scans/a.nii.gz"], "scans/../scans/a.nii.gz", "is an input"),
        (["scans/a.nii.gz", "x_seg.nii.gz", "x.nii.gz"], ".", "is an input"),
        (["scans/a.nii.gz"], "seg.mhd", "cannot write .mhd"),
        (["scans/a.nii.gz"], "seg.dcm", "cannot write .dcm"),
        (["scans/a.nii.gz"], "seg.nii.gs", "cannot write .gs .*name a file in .nii.gz"),
        (["scans/a.nii.gz", "scans/c.nii.gz"], "seg.txt", "cannot write .txt .*one with such a name has to be there"),
        (["scans/a.nii.gz"], "taken", "cannot make the output folder"),
        (["scans/a.nii.gz"], "taken/seg.nii.gz", "cannot make the output folder"),
        ([], "out", "none given"),
        (["scans/d.nii.gz"], "out", "no such file"),
    ],
)
def test_refused_at_once(inputs, target, reason, model, scans, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("")
    for name in ("x.nii.gz", "x_seg.nii.gz"):
        shutil.copy(scans / "a.nii.gz", tmp_path / name)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises((ValueError, OSError), match=reason):
        predict_many(model, inputs, target)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_folder_that_may_not_be_written_to(model, ct_file, tmp_path, monkeypatch):
    monkeypatch.setattr("medseg3d.outputs.os.access", lambda path, mode: False)
    with pytest.raises(PermissionError, match="no permission to write into the output folder"):
        predict_many(model, ct_file, tmp_path)


# Failures


def failing(error):
    def inferer(image, network):
        raise error

    return inferer


@pytest.mark.parametrize(
    ("error", "words", "out_of_memory"),
    [
        (
            MemoryError("Unable to allocate 40 GiB"),
            "out of memory (MemoryError: Unable to allocate 40 GiB): crop",
            True,
        ),
        (MemoryError(), "out of memory (MemoryError)", True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."), "out of memory", True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory", True),
        (KeyError("image"), "KeyError: 'image'", False),
        (RuntimeError("two\nlines"), "RuntimeError: two lines", False),
    ],
)
def test_an_error_is_one_line(error, words, out_of_memory, model, ct_file, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "inferer", failing(error))
    (result,) = predict_many(model, ct_file, tmp_path / "out")
    assert words in result.error and "\n" not in result.error
    assert result.out_of_memory == out_of_memory
    assert names(tmp_path / "out") == ["failures.csv"]


def test_memory_that_runs_out_within_a_transform(model, ct_file, tmp_path, monkeypatch):
    def preprocessing(data):
        try:
            raise MemoryError("Unable to allocate 7 GiB")
        except MemoryError as error:
            raise RuntimeError("applying transform <Spacingd>") from error

    monkeypatch.setattr(model, "preprocessing", preprocessing)
    (result,) = predict_many(model, ct_file, tmp_path / "out")
    assert result.out_of_memory and "7 GiB" in result.error


def test_ctrl_c_is_not_a_failed_case(model, scans, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "inferer", failing(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        list(predict_many(model, scans, tmp_path / "out"))
    assert names(tmp_path / "out") == []


def test_what_was_finished_before_ctrl_c_is_in_the_tables_and_the_report(model, scans, tmp_path, monkeypatch, predict):
    segment, begun = type(model).segment, []

    def until_the_second(self, scan, progress=None):
        begun.append(scan)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return segment(self, scan, progress)

    monkeypatch.setattr("medseg3d.segmenter.Segmenter.segment", until_the_second)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "failures.csv").write_text("case,input,error\nc,c.nii.gz,of an earlier run\n")
    predict(scans, tmp_path / "out", "-s", "--report")
    assert [row["case"] for row in rows(tmp_path / "out" / "statistics.csv")] == ["a"]
    cases = json.loads((tmp_path / "out" / "run.json").read_text())["cases"]
    assert [case["name"] for case in cases] == ["a"]
    assert "c" in {row["case"] for row in rows(tmp_path / "out" / "failures.csv")}, "nobody has tried it again"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "no space left on device")])
def test_what_is_written_in_part_is_removed(error, model, ct_file, tmp_path, monkeypatch):
    def save(result, path):
        assert (tmp_path / "out" / "ct.stats.json").is_file()
        raise error

    monkeypatch.setattr("medseg3d.segmenter.Segmentation.save", save)
    plan = OutputPlan(tmp_path / "out", statistics=True, preview=True)
    if isinstance(error, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            list(predict_many(model, ct_file, plan))
        assert names(plan.folder) == []
    else:
        (result,) = predict_many(model, ct_file, plan)
        assert "no space left" in result.error and names(plan.folder) == ["failures.csv"]


def test_a_full_disk(model, ct_file, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("medseg3d.io.atomic.os.fsync", full)
    (result,) = predict_many(model, ct_file, tmp_path / "seg.nii.gz")
    assert "no space left on device; free some space" in result.error and names(tmp_path) == []


# Taking up again


def test_resume_does_only_what_is_left(model, scans, ct_file, tmp_path, monkeypatch):
    out = tmp_path / "out"
    seen = counted(model, monkeypatch)
    list(predict_many(model, scans, out))
    shutil.copy(ct_file, scans / "b.nii.gz")  # the transfer is done now
    seen.clear()
    results = list(predict_many(model, scans, out, resume=True))
    assert seen == ["b.nii.gz"]
    assert [result.resumed for result in results] == [True, False, True]
    assert not any(result.error for result in results) and not (out / "failures.csv").exists()
    assert results[0].outputs["segmentation"].is_file()
    assert "finished by an earlier run" in results[0].record()["warnings"]

    seen.clear()
    list(predict_many(model, scans, out))
    assert seen == ["a.nii.gz", "b.nii.gz", "c.nii.gz"]  # without resume all are done again


def test_resume_does_again_what_has_changed(model, ct_file, tmp_path, monkeypatch):
    scan = shutil.copy(ct_file, tmp_path / "a.nii.gz")
    out = tmp_path / "out"
    list(predict_many(model, scan, out))
    seen = counted(model, monkeypatch)

    def again(plan=out, **options):
        seen.clear()
        list(predict_many(model, scan, plan, resume=True, **options))
        return bool(seen)

    assert not again()
    assert again(OutputPlan(out, statistics=True))
    assert not again(OutputPlan(out, statistics=True))
    assert again(allow_non_hu=True) and again()
    assert again(OutputPlan(out, ".mha")) and again()
    tiny.write_ct(tmp_path / "a.nii.gz", array=tiny.ct() + np.int16(1))
    assert again() and not again()
    monkeypatch.setitem(model.record, "bundle_sha256", "another model")
    assert again() and not again()
    (out / "a_seg.nii.gz").unlink()
    assert again()


def test_resume_takes_no_file_of_another_model(model, ct_file, tmp_path, monkeypatch):
    out = tmp_path / "out"
    plain, with_statistics = OutputPlan(out), OutputPlan(out, statistics=True)

    def resumed(plan):
        (result,) = predict_many(model, ct_file, plan, resume=True)
        assert result.error is None
        return result.resumed

    list(predict_many(model, ct_file, with_statistics))
    with monkeypatch.context() as other:
        other.setitem(model.record, "bundle_sha256", "another model")
        list(predict_many(model, ct_file, plain))
        assert resumed(plain) and not resumed(with_statistics)  # the statistics there were those of the first
        assert resumed(with_statistics) and resumed(plain)
    list(predict_many(model, ct_file, plain))
    with monkeypatch.context() as other:
        other.setitem(model.record, "bundle_sha256", "another model")
        other.setattr("medseg3d.batch.Ledger.note", lambda *_: None)  # killed before it
        list(predict_many(model, ct_file, plain))
    assert not resumed(plain)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null"])
def test_a_damaged_ledger_costs_only_time(text, model, ct_file, tmp_path):
    (tmp_path / "finished.json").write_text(text)
    (result,) = predict_many(model, ct_file, tmp_path, resume=True)
    assert result.error is None and not result.resumed
    assert list(json.loads((tmp_path / "finished.json").read_text())) == ["ct"]


def test_a_result_of_another_input_is_not_replaced_in_silence(model, tmp_path):
    for patient in ("a", "b"):
        (tmp_path / patient).mkdir()
    tiny.write_ct(tmp_path / "a" / "ct.nii.gz")
    tiny.write_ct(tmp_path / "b" / "ct.nii.gz", array=tiny.ct() + np.int16(1))

    def warned(patient):
        (result,) = predict_many(model, tmp_path / patient / "ct.nii.gz", tmp_path / "out")
        return [warning for warning in result.record()["warnings"] if "another input" in warning]

    assert not warned("a") and not warned("a")
    assert warned("b") == ["ct_seg.nii.gz of another input was replaced: that had the same name, ct"]
    assert not warned("b")


def test_statistics_of_a_resumed_run_have_every_case(model, scans, tmp_path):
    plan = OutputPlan(tmp_path / "out", statistics=True)
    list(predict_many(model, scans / "a.nii.gz", plan))
    list(predict_many(model, scans, plan, resume=True))
    assert {row["case"] for row in rows(plan.folder / "statistics.csv")} == {"a", "c"}


def test_tables_of_a_folder_keep_earlier_runs(model, scans, tmp_path, ct_file, monkeypatch):
    plan = OutputPlan(tmp_path / "out", statistics=True)
    list(predict_many(model, [scans / "a.nii.gz", scans / "b.nii.gz"], plan))
    list(predict_many(model, scans / "c.nii.gz", plan))
    assert [row["case"] for row in rows(plan.folder / "statistics.csv")] == ["a", "c"]
    assert [row["case"] for row in rows(plan.folder / "failures.csv")] == ["b"]
    with monkeypatch.context() as other:
        other.setitem(model.record, "bundle_sha256", "another model")
        list(predict_many(model, scans / "a.nii.gz", OutputPlan(tmp_path / "out")))  # its figures are of the first
    shutil.copy(ct_file, scans / "b.nii.gz")
    list(predict_many(model, scans / "b.nii.gz", plan))
    assert [row["case"] for row in rows(plan.folder / "statistics.csv")] == ["b", "c"]
    assert not (plan.folder / "failures.csv").exists()


def test_nothing_of_another_model_stays_beside_a_new_segmentation(model, scans, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    list(predict_many(model, [scans / "a.nii.gz", scans / "c.nii.gz"], OutputPlan(folder, "", True, True)))
    list(predict_many(model, scans / "a.nii.gz", folder))
    assert [row["case"] for row in rows(folder / "statistics.csv")] == ["a", "c"], "the same model has the same figures"
    monkeypatch.setitem(model.record, "bundle_sha256", "another model")
    (folder / "a.margin.nii.gz").touch()  # which no run of these noted
    list(predict_many(model, scans / "a.nii.gz", folder))
    sidecars = [name for name in names(folder) if name.startswith("a")]
    assert sidecars == ["a.margin.nii.gz", "a_seg.labels.json", "a_seg.nii.gz"]
    assert [row["case"] for row in rows(folder / "statistics.csv")] == ["c"]
    list(predict_many(model, scans / "c.nii.gz", OutputPlan(folder, preview=True)))
    assert (folder / "c.preview.png").is_file() and not (folder / "c.stats.json").exists()
    assert not (folder / "statistics.csv").exists()


def test_runs_at_the_same_time_share_a_folder(model, scans, tmp_path):
    first, second = (predict_many(model, scans / f"{name}.nii.gz", tmp_path) for name in "ac")  # both have read it
    assert not any(result.error for result in (*first, *second))
    (resumed,) = predict_many(model, scans / "a.nii.gz", tmp_path, resume=True)
    assert resumed.resumed and sorted(json.loads((tmp_path / "finished.json").read_text())) == ["a", "c"]


def test_inputs_that_were_found_already(model, scans, tmp_path):
    inputs = find_inputs([scans / "a.nii.gz"])
    assert [result.case for result in predict_many(model, inputs, tmp_path / "out")] == list(inputs.cases)

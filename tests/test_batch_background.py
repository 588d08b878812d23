"""Reading and writing while the network works: what happens beside what, how much is ahead, and how a run ends."""

from __future__ import annotations

import csv
import gc
import json
import os
import signal
import threading
import time
import weakref
from types import SimpleNamespace

import pytest

from medseg3d.batch import predict_many

LONG = 20  # seconds until a test that would wait for ever fails
SHORT = 0.05  # seconds given to what must not happen


class Result:
    """Stands for a Segmentation."""

    warnings, seconds = (), {}

    def __init__(self, name, model):
        self.name, self.model = name, model

    def save(self, path):
        self.model.happens("write", self.name)
        path.write_text(self.name)
        self.model.happens("written", self.name)


class Model:
    """Stands for a Segmenter: logs what it is asked for and waits, or fails, where a test says so."""

    pictures = None

    def __init__(self):
        self.record = {"bundle_sha256": "0"}
        self.log, self.threads, self.results = [], {}, []
        self.before = {}  # (what, case) -> called before it is logged
        self.news = threading.Condition()

    def happens(self, what, name):
        self.before.get((what, name), lambda: None)()
        with self.news:
            self.log.append((what, name))
            self.threads.setdefault(what, set()).add(threading.current_thread())
            self.news.notify_all()

    def wait_for(self, what, name, seconds=LONG):
        with self.news:
            return self.news.wait_for(lambda: (what, name) in self.log, seconds)

    def must_see(self, what, name):
        assert self.wait_for(what, name), f"no {what} {name} beside this; so far: {self.log}"

    def must_not_see(self, what, name):
        assert not self.wait_for(what, name, SHORT), f"{what} {name} came too early: {self.log}"

    def when(self, what, name, *calls):
        self.before[what, name] = lambda: [call() for call in calls]

    def fails(self, what, name, error):
        def fail():
            raise error

        self.when(what, name, fail)

    def read(self, path, allow_non_hu=False, progress=None):
        self.happens("read", path.stem)
        self.happens("was read", path.stem)
        return SimpleNamespace(name=path.stem)

    def segment(self, scan, progress=None):
        progress("network")
        self.happens("segment", scan.name)
        self.happens("segmented", scan.name)
        result = Result(scan.name, self)
        self.results.append(weakref.ref(result))
        return result


@pytest.fixture
def model():
    yield Model()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("medseg3d")]


@pytest.fixture
def scans(tmp_path):
    paths = [tmp_path / "scans" / f"{name}.nii" for name in "abcd"]
    paths[0].parent.mkdir()
    for path in paths:
        path.write_text(path.stem)
    return paths


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def finished(out):
    """The cases that are in the ledger, each with its whole file; no other file may be there."""
    names = sorted(json.loads((out / "finished.json").read_text())) if (out / "finished.json").exists() else []
    written = sorted(path for path in out.iterdir() if path.suffix != ".json" and path.suffix != ".csv")
    assert [path.name for path in written] == [f"{name}_seg.nii.gz" for name in names]
    assert [path.read_text() for path in written] == names
    return names


def failures(out):
    with (out / "failures.csv").open(newline="") as file:
        return {row["case"]: row["error"] for row in csv.DictReader(file)}


# What happens beside what


def test_the_next_scan_is_read_and_the_last_result_written_during_the_network(model, scans, out):
    model.when("segmented", "a", lambda: model.must_see("was read", "b"))
    model.when("segmented", "b", lambda: model.must_see("was read", "c"), lambda: model.must_see("written", "a"))
    model.when("segmented", "d", lambda: model.must_see("written", "c"))
    results = list(predict_many(model, scans, out))
    assert [result.case.name for result in results] == list("abcd")
    assert not any(result.error for result in results)
    assert finished(out) == list("abcd")


def test_no_more_than_one_scan_is_read_ahead(model, scans, out):
    model.when("segmented", "a", lambda: model.must_see("was read", "b"), lambda: model.must_not_see("read", "c"))
    model.when("segmented", "b", lambda: model.must_see("was read", "c"), lambda: model.must_not_see("read", "d"))
    results = list(predict_many(model, scans, out))
    assert not any(result.error for result in results), [result.error for result in results]


def test_no_more_than_one_result_waits_to_be_written(model, scans, out):
    """However slow the disk, the third case is not begun before the first is written and handed over."""
    model.when("written", "a", lambda: model.must_see("segmented", "b"), lambda: model.must_not_see("segment", "c"))
    results = list(predict_many(model, scans, out))
    assert not any(result.error for result in results), [result.error for result in results]
    assert model.log.index(("segment", "c")) > model.log.index(("written", "a"))


def test_a_slow_caller_holds_everything_up(model, scans, out):
    results = predict_many(model, scans, out)
    next(results)
    model.must_see("written", "b")
    model.must_not_see("segment", "c")
    model.must_not_see("read", "d")
    results.close()


@pytest.mark.parametrize("options", [{"background_io": False}, {}])
def test_one_after_the_other_where_that_is_asked_for_or_memory_is_limited(model, scans, out, options):
    model.limited = not options
    steps = ("read", "was read", "segment", "segmented", "write", "written")
    for n, result in enumerate(predict_many(model, scans, out, **options), 1):
        assert model.log == [(step, name) for name in "abcd"[:n] for step in steps]
        assert finished(out)[-1] == result.case.name
    assert set().union(*model.threads.values()) == {threading.main_thread()}


def test_network_and_progress_stay_on_the_callers_thread(model, scans, out):
    told, threads = [], set()

    def progress(case, stage):
        told.append((case.name, stage))
        threads.add(threading.current_thread())

    list(predict_many(model, scans, out, progress=progress))
    assert told == [(name, stage) for name in "abcd" for stage in ("read", "network", "write")]
    assert threads == model.threads["segment"] == {threading.main_thread()}
    assert threading.main_thread() not in model.threads["read"] | model.threads["write"]


@pytest.mark.parametrize("background", [True, False])
def test_results_are_let_go(model, scans, out, background):
    """When a case is begun, the result two before it is gone unless the caller keeps it."""

    def gone(n):
        gc.collect()
        assert model.results[n]() is None

    model.when("segment", "c", lambda: gone(0))
    model.when("segment", "d", lambda: gone(1))
    errors = []
    for result in predict_many(model, scans, out, background_io=background):
        errors.append(result.error)
        del result
    assert errors == [None] * 4


def test_one_after_the_other_no_earlier_result_is_held(model, scans, out):
    def gone(n):
        gc.collect()
        assert model.results[n]() is None

    for n, name in enumerate("bcd"):
        model.when("segment", name, lambda n=n: gone(n))
    errors = []
    for result in predict_many(model, scans, out, background_io=False):
        errors.append(result.error)
        del result
    assert errors == [None] * 4


# Failures


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("step", ["read", "segment", "write"])
def test_a_case_that_fails_stops_no_other(model, scans, out, step, background):
    for name in "bd":
        model.fails(step, name, ValueError(f"{name} is bad"))
    results = list(predict_many(model, scans, out, background_io=background))
    assert [(result.case.name, result.error) for result in results] == [
        ("a", None),
        ("b", "b is bad"),
        ("c", None),
        ("d", "d is bad"),
    ]
    assert failures(out) == {"b": "b is bad", "d": "d is bad"}
    assert finished(out) == ["a", "c"]


def test_a_scan_that_vanishes_stops_no_other(model, scans, out):
    list(predict_many(model, scans, out))
    model.log.clear()
    found = predict_many(model, scans, out, resume=True)
    scans[1].unlink()
    results = list(found)
    assert [result.resumed for result in results] == [True, False, True, True]
    assert "b.nii" in results[1].error and not model.log


@pytest.mark.parametrize("step", ["read", "write"])
def test_memory_that_runs_out_on_a_thread(model, scans, out, step):
    model.fails(step, "b", MemoryError("Unable to allocate 7 GiB"))
    results = list(predict_many(model, scans, out))
    assert [result.out_of_memory for result in results] == [False, True, False, False]


# How a run ends


def test_ctrl_c_in_the_network_lets_the_write_beside_it_end(model, scans, out):
    interrupted = threading.Event()

    def interrupt():
        model.must_see("write", "a")
        interrupted.set()
        raise KeyboardInterrupt

    model.when("written", "a", lambda: interrupted.wait(LONG))
    model.when("segmented", "b", interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(predict_many(model, scans, out))
    assert finished(out) == ["a"]
    assert ("read", "d") not in model.log and not (out / "failures.csv").exists()


@pytest.mark.skipif(os.name != "posix", reason="signals to a thread are POSIX's")
def test_ctrl_c_while_the_first_scan_is_read_begins_no_other(model, scans, out):
    def press():
        time.sleep(4 * SHORT)  # the caller waits for the scan by now
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(10 * SHORT)  # a long read, which cannot be broken off

    model.when("read", "a", press)
    with pytest.raises(KeyboardInterrupt):
        list(predict_many(model, scans, out))
    assert model.log == [("read", "a"), ("was read", "a")]


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("step", ["read", "segment", "write"])
def test_an_interrupt_in_any_step_reaches_the_caller(model, scans, out, step, background):
    model.fails(step, "b", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        list(predict_many(model, scans, out, background_io=background))
    assert finished(out)[0] == "a" and "b" not in finished(out)  # c may have been waiting for b's end


def test_a_caller_who_stops_early_leaves_nothing_half_done(model, scans, out):
    results = predict_many(model, scans, out)
    assert next(results).case.name == "a"
    results.close()
    assert finished(out) == ["a", "b"]  # b was segmented beside the writing of a; it is not thrown away
    assert ("segment", "c") not in model.log and not (out / "failures.csv").exists()
    again = list(predict_many(model, scans, out, resume=True))
    assert [result.resumed for result in again] == [True, True, False, False]


def test_a_run_that_is_never_begun_reads_nothing(model, scans, out):
    predict_many(model, scans, out).close()
    assert not model.log


@pytest.mark.parametrize("count", [1, 2])
def test_few_cases(model, scans, out, count):
    assert [result.case.name for result in predict_many(model, scans[:count], out)] == list("abcd")[:count]

"""How a Segmenter runs its network: compiled or as it is, with the memory of a CPU kept from window to window."""

from __future__ import annotations

import contextlib
import functools

import numpy as np
import pytest
import torch

import medseg3d as ms
from tests import tiny_bundles as tiny

PARTS = ("network", "preprocessing", "inferer", "postprocessing", "table", "device", "name")


def segmenter_of(model, **options):
    return ms.Segmenter(**{part: getattr(model, part) for part in PARTS}, **options)


def compiled(model, backend, monkeypatch):
    """The same model with its network compiled by a backend that takes no compiler, and what the backend was given."""
    graphs = []

    def record(graph, inputs):
        graphs.append(graph)
        return backend(graph)

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=record))
    torch._dynamo.reset()
    return segmenter_of(model, compile=True), graphs


def test_compiled(models, ct_file, monkeypatch):
    segmenter, graphs = compiled(models.own, lambda graph: graph.forward, monkeypatch)
    assert not graphs, "it is compiled when it is needed"
    for _ in range(2):
        result = segmenter.predict(ct_file)
        assert not result.warnings
        np.testing.assert_array_equal(result.segmentation.array, models.own.predict(ct_file).segmentation.array)
        assert len(graphs) == 1
    assert segmenter.network is models.own.network and not graphs[1:]


def test_the_network_is_not_compiled_unless_it_is_asked_for(models, ct_file, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("compiled")

    monkeypatch.setattr(torch, "compile", refuse)
    segmenter_of(models.own).predict(ct_file)


def test_where_it_cannot_be_compiled_it_runs_as_it_is(models, ct_file, monkeypatch):
    def fail(graph):
        raise OSError("there is no C++ compiler\n" + "and here is all that was tried " * 20)

    segmenter, graphs = compiled(models.own, fail, monkeypatch)
    result = segmenter.predict(ct_file)
    (warning,) = result.warnings
    assert warning.startswith("the network could not be compiled and ran as it is, which is slower: ")
    assert "there is no C++ compiler and here" in warning and "\n" not in warning and len(warning) < 280
    np.testing.assert_array_equal(result.segmentation.array, models.own.predict(ct_file).segmentation.array)
    assert not segmenter.predict(ct_file).warnings and len(graphs) == 1, "once is enough"


def test_an_error_of_the_bundle_is_no_failure_to_compile(models, ct_file, monkeypatch):
    def inferer(image, network):
        raise ValueError("this bundle takes no such scan")

    segmenter, _ = compiled(models.own, lambda graph: graph.forward, monkeypatch)
    monkeypatch.setattr(segmenter, "inferer", inferer)
    with pytest.raises(ValueError, match="no such scan"):
        segmenter.predict(ct_file)
    monkeypatch.setattr(segmenter, "inferer", models.own.inferer)
    assert not segmenter.predict(ct_file).warnings and segmenter.runner.compiles


@pytest.mark.parametrize(("device", "kept"), [("cpu", ["begin", "network", "end"]), ("meta", ["network"])])
def test_freed_memory_is_kept_on_the_cpu(device, kept, models, monkeypatch):
    events = []

    @contextlib.contextmanager
    def keep():
        events.append("begin")
        yield
        events.append("end")

    def inferer(image, network):
        events.append("network")
        return torch.zeros(1, 3, *image.shape[2:])

    monkeypatch.setattr("medseg3d.segmenter.keep_freed_memory", keep)
    monkeypatch.setattr(models.own, "inferer", inferer)
    monkeypatch.setattr(models.own, "device", torch.device(device))
    models.own.predict((tiny.ct(), tiny.LPS))
    assert events == kept

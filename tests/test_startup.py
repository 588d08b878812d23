"""A command's process imports no more than it needs, and Python is left as it was found."""

from __future__ import annotations

import gc
import shutil
import sys
import types

import pytest

from medseg3d.catalogue import find_bundle
from medseg3d.startup import quick_imports
from tests.command_line import finished, started

# Runs the command line and tells which modules it has at its end.
LISTING = """
from medseg3d.cli import main
code = main()
print(*sorted({"ignite", "sympy", "monai", "torch"} & set(sys.modules)), file=sys.stderr)
sys.exit(code)
"""


@pytest.fixture(autouse=True)
def thawed():
    """Frozen objects are looked through again: pytest's process goes on."""
    yield
    gc.unfreeze()


def test_a_scan_is_segmented_without_training_engines_and_symbolic_algebra(bundles, ct_file, tmp_path):
    pytest.importorskip("ignite")
    plain = "predict", "-i", ct_file, "-d", "cpu", "-q", "--trust"
    with_code = shutil.copytree(bundles.zoo, tmp_path / "with_code")
    (with_code / "scripts").mkdir()
    (with_code / "scripts" / "__init__.py").touch()
    runs = {
        name: started(*plain, "-m", bundle, "-o", tmp_path / f"{name}.nii.gz", code=LISTING)
        for name, bundle in {"configs": bundles.zoo, "code": with_code}.items()
    }
    listed = {name: finished(process) for name, process in runs.items()}
    assert [code for code, _, _ in listed.values()] == [0, 0]
    assert listed["configs"][2][-1].split() == ["monai", "torch"]
    assert "ignite" in listed["code"][2][-1].split()  # its scripts may build on it
    assert (tmp_path / "configs.nii.gz").read_bytes() == (tmp_path / "code.nii.gz").read_bytes()


@pytest.mark.parametrize("engines", [True, False])
def test_ignite_is_hidden_only_while_monai_is_imported(monkeypatch, engines):
    monkeypatch.delitem(sys.modules, "monai")
    monkeypatch.delitem(sys.modules, "ignite", raising=False)
    with quick_imports(engines):
        assert ("ignite" in sys.modules) == (not engines)
    assert "ignite" not in sys.modules


def test_what_is_imported_already_stays(monkeypatch):
    ignite = types.ModuleType("ignite")
    monkeypatch.setitem(sys.modules, "ignite", ignite)
    monkeypatch.delitem(sys.modules, "monai")
    with quick_imports(engines=False):
        assert sys.modules["ignite"] is ignite
    assert sys.modules["ignite"] is ignite


def test_cycles_are_searched_for_again_but_not_among_what_is_there():
    assert gc.isenabled() and gc.get_freeze_count() == 0
    with pytest.raises(ImportError), quick_imports():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled() and gc.get_freeze_count() > 10_000


def test_a_search_that_was_off_stays_off():
    gc.disable()
    try:
        with quick_imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_code_of_a_bundle_is_found_at_any_depth(bundles, tmp_path):
    folder = shutil.copytree(bundles.own, tmp_path / "own")
    assert not find_bundle(folder).has_code
    (folder / "scripts" / "deep").mkdir(parents=True)
    assert not find_bundle(folder).has_code
    (folder / "scripts" / "deep" / "network.py").touch()
    assert find_bundle(folder).has_code

"""Fixtures that every test may use."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell without job control starts what runs in its background so, and Ctrl-C is tested.
    signal.signal(signal.SIGINT, signal.default_int_handler)
SHARED = Path(os.environ.get("MEDSEG3D_SHARED", ROOT.parent / "shared"))


def shared(*parts: str) -> Path:
    """A path among the reference data beside the repository; the test skips where the data is absent.

    With MEDSEG3D_REQUIRE_SHARED=1, as continuous integration sets it where the data is there, it fails instead.
    """
    path = SHARED.joinpath(*parts)
    if not path.exists():
        refuse = pytest.fail if os.environ.get("MEDSEG3D_REQUIRE_SHARED") == "1" else pytest.skip
        refuse(f"reference data is not beside the repository: {'/'.join(parts)}")
    return path


@pytest.fixture(name="shared")
def shared_fixture():
    return shared


@pytest.fixture(scope="session")
def load_script():
    """A function that imports a script of the repository by its name."""

    def load(name: str) -> ModuleType:
        path = ROOT / "scripts" / f"{name}.py"
        if not path.is_file():
            pytest.skip("the scripts are not beside this installation")
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module

    return load


# The main path: tiny bundles and a made-up CT (tests/tiny_bundles.py), written and loaded once.


@pytest.fixture(scope="session")
def bundles(tmp_path_factory):
    """Paths of three bundles that do not ship with medseg3d: .zoo, .own, .threshold."""
    from tests import tiny_bundles as tiny

    folder = tmp_path_factory.mktemp("bundles")
    return SimpleNamespace(
        zoo=tiny.write_zoo_bundle(folder / "spleen_ct_segmentation"),
        own=tiny.write_own_bundle(folder / "own_ct_unet"),
        threshold=tiny.write_threshold_bundle(folder / "bone_ct_threshold"),
    )


@pytest.fixture(scope="session")
def models(bundles):
    """The same three, loaded on the CPU."""
    from medseg3d import load_model

    return SimpleNamespace(
        **{key: load_model(path, "cpu", trust=True, precision="fp32") for key, path in vars(bundles).items()}
    )


@pytest.fixture(scope="session")
def shipped_model():
    from medseg3d import load_model

    return load_model(device="cpu")


@pytest.fixture(scope="session")
def ct_file(tmp_path_factory):
    from tests.tiny_bundles import write_ct

    return write_ct(tmp_path_factory.mktemp("scans") / "ct.nii.gz")


@pytest.fixture
def run(capsys):
    """run("predict", ...) -> (exit code, lines on stdout, lines on stderr)."""
    from tests.command_line import run_here

    return partial(run_here, capsys)


@pytest.fixture
def predict(run, bundles):
    """predict(scan or scans, output, ...) -> the same, for `medseg3d predict` with the threshold bundle."""

    def run_predict(scans, output, *options):
        scans = scans if isinstance(scans, list) else [scans]
        return run("predict", "-i", *scans, "-o", output, "-m", bundles.threshold, "--trust", "-d", "cpu", *options)

    return run_predict


@pytest.fixture
def scans(tmp_path, ct_file):
    """Three scans, of which the second is cut off."""
    folder = tmp_path / "scans"
    folder.mkdir()
    for name in "abc":
        shutil.copy(ct_file, folder / f"{name}.nii.gz")
    content = ct_file.read_bytes()
    (folder / "b.nii.gz").write_bytes(content[: len(content) // 2])
    return folder

"""Fixtures that every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
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

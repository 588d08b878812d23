"""Feature pyramids against torchvision 0.28: the same weights, the same maps."""

from __future__ import annotations

import pytest

from medseg3d.networks.backbones.fpn import FeaturePyramidNetwork, LastLevelMaxPool, LastLevelP6P7
from tests.parity.golden2d import Golden2d

CHANNELS = (8, 16, 24, 32)
EXTRA = {"plain": lambda: None, "maxpool": LastLevelMaxPool, "p6p7": lambda: LastLevelP6P7(16, 16)}


@pytest.mark.parametrize("kind", EXTRA)
def test_maps_are_those_of_torchvision(shared, kind):
    golden = Golden2d(shared("golden", "2d", "ops"), "fpn", spec=f"fpn_{kind}")
    network = golden.fill(FeaturePyramidNetwork(CHANNELS, 16, EXTRA[kind]()))
    maps = network({f"feat{i}": golden.tensor(f"in_feat{i}") for i in range(4)})
    assert [f"{kind}_{name}" for name in maps] == [name for name in golden.arrays.files if name.startswith(f"{kind}_")]
    for name, x in maps.items():
        golden.check(f"{kind}_{name}", x)

"""What strategies cost on a scan: windows times the operations of one."""

from __future__ import annotations

import json

import pytest

from medseg3d import load_model
from medseg3d.catalogue import UntrustedBundle, find_bundle
from medseg3d.costs import scan_costs
from medseg3d.flops import count_operations
from medseg3d.networks import UNet
from tests import tiny_bundles as tiny


def network(bundle, **changes):
    config = json.loads((bundle / "configs" / "inference.json").read_text())["network_def"]
    return UNet(**{name: value for name, value in {**config, **changes}.items() if not name.startswith("_")})


def test_the_three_strategies_of_a_bundle_that_ships():
    bundle = find_bundle("headneck_ct_unet").path
    found = {cost.strategy: cost for cost in scan_costs("headneck_ct_unet", (300, 240, 120), (1.0, 1.25, 2.5))}
    assert [cost.own for cost in found.values()] == [True, False, False]
    # 300 mm, 300 mm and 300 mm in voxels of 3, 3 and 2.5 mm are 100, 100 and 120, and windows of 64 step by 32.
    own = count_operations(network(bundle), (1, 1, 64, 64, 64))
    assert (found["sub-volumes"].windows, found["sub-volumes"].window) == (3 * 3 * 3, (64, 64, 64))
    assert found["sub-volumes"].flops == 27 * own.flops == 2 * found["sub-volumes"].macs
    assert found["sub-volumes"].parameters == own.parameters
    flat = count_operations(network(bundle, spatial_dims=2), (1, 1, 128, 128))
    assert (found["slices"].windows, found["slices"].window) == (120, (128, 128))
    assert (found["slices"].flops, found["slices"].parameters) == (120 * flat.flops, flat.parameters)
    small = count_operations(network(bundle), (1, 1, 128, 128, 64))
    assert (found["downsampled"].windows, found["downsampled"].flops) == (1, small.flops)


def test_weights_need_not_be_there(bundles, tmp_path):
    import shutil

    copy = tmp_path / bundles.own.name
    shutil.copytree(bundles.own, copy)
    (copy / "models" / "model.pt").unlink()
    assert scan_costs(copy, tiny.SHAPE, (4.0,) * 3, trust=True) == scan_costs(
        bundles.own, tiny.SHAPE, (4.0,) * 3, trust=True
    )
    with pytest.raises(UntrustedBundle):
        scan_costs(copy, tiny.SHAPE, (4.0,) * 3)


def test_a_network_that_is_for_one_strategy_says_why(bundles):
    """The threshold bundle's network takes no other number of axes."""
    found = scan_costs(bundles.threshold, tiny.SHAPE, (4.0,) * 3, trust=True)
    refused = [cost for cost in found if cost.refusal]
    assert refused and all(cost.flops == 0 and not cost.own for cost in refused)
    assert sum(cost.own for cost in found) == 1


def test_pictures():
    """Windows of 512 that overlap by a quarter."""
    (cost,) = scan_costs("nuclei_microscopy_unet", (700, 1200))
    one = count_operations(network(find_bundle("nuclei_microscopy_unet").path), (1, 3, 512, 512))
    assert (cost.windows, cost.window, cost.flops) == (2 * 3, (512, 512), 6 * one.flops)
    with pytest.raises(ValueError, match="2 numbers above 0 are needed, got 300 400 20"):
        scan_costs("nuclei_microscopy_unet", (300, 400, 20))


def test_spacing_of_a_scan_is_needed():
    with pytest.raises(ValueError, match="the spacing of a scan: 3 numbers above 0 are needed, got none"):
        scan_costs("headneck_ct_unet", (64, 64, 64))


def test_a_detector_is_counted_with_its_weights():
    """On random values: what it does depends on what it sees."""
    first, again = (scan_costs("nuclei_microscopy_maskrcnn", (128, 128))[0] for _ in range(2))
    assert first == again and first.of_noise
    filled = load_model("nuclei_microscopy_maskrcnn", "cpu").network
    assert first.flops == count_operations(filled, (1, 3, *first.window)).flops
    assert not scan_costs("nuclei_microscopy_unet", (128, 128))[0].of_noise

"""Every semantic network that has two axes, slice by slice through a CT: along each axis, and fused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from medseg3d.inference import Slices
from medseg3d.io import read_volume
from medseg3d.networks import NETWORKS, build
from tests import tiny_bundles as tiny
from tests.conftest import shared

CLASSES, AXES = 3, (0, 1, 2)
NOT_SEMANTIC = {"swin", "mask_rcnn", "upsnet"}
FCN = {"width": 1 / 32, "padding": "same", "stride": 8}
UNETR = {"spatial_dims": 2, "img_size": (48, 48), "feature_size": 4, "hidden_size": 24, "mlp_dim": 40, "num_heads": 3}
# name in NETWORKS, variant: arguments of the network, arguments of Slices
CONFIGURATIONS = {
    ("fcn", "vgg16"): ({**FCN}, {}),
    ("fcn", "vgg16_bn at 100 pixels"): ({**FCN, "backbone": "vgg16_bn", "padding": 100, "stride": 16}, {}),
    ("fcn", "alexnet"): ({**FCN, "backbone": "alexnet", "width": 1 / 16}, {}),
    ("fcn", "googlenet"): ({**FCN, "backbone": "googlenet", "width": 1}, {}),
    ("fcn_resnet", "resnet50"): ({"backbone_arguments": {"width_per_group": 8}}, {}),
    ("deconvnet", "windows"): ({"width": 1 / 32}, {"roi_size": 224}),
    ("unet", ""): ({"spatial_dims": 2, "channels": (4, 8, 8), "norm": "instance"}, {"divisible": 4}),
    ("vnet", ""): ({"spatial_dims": 2}, {"divisible": 16}),
    ("unetr", "windows"): (UNETR, {"roi_size": 48}),
    ("swin_unetr", "windows"): ({"spatial_dims": 2, "feature_size": 12}, {"roi_size": 64}),
}


@pytest.fixture(params=CONFIGURATIONS, ids=lambda key: " ".join(key).strip())
def subject(request):
    """A network in eval mode, and how it is shown slices."""
    arguments, showing = CONFIGURATIONS[request.param]
    torch.manual_seed(0)
    network = build(request.param[0], in_channels=1, out_channels=CLASSES, **arguments).eval()
    for name, layer in network.named_modules():  # FCN's scores start at zero, DeconvNet's grow too small to see
        if "score" in name and isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=0.3)
        if isinstance(layer, nn.ConvTranspose2d) and request.param[0] == "deconvnet":
            nn.init.kaiming_normal_(layer.weight, mode="fan_out")
    return network, showing


def ct() -> torch.Tensor:
    """(1, 1, 3, 9, 10): tissue and bone in air, 0 to 1."""
    return scaled(tiny.ct()[4::16, ::4, ::4])


def scaled(array_DHW: np.ndarray) -> torch.Tensor:
    return ((torch.from_numpy(array_DHW.astype(np.float32)) + 1000) / 2000).clamp(0, 1)[None, None]


def by_hand(image: torch.Tensor, network: nn.Module, axis: int, showing: dict) -> torch.Tensor:
    """Logits (1, K, D, H, W): each slice alone, zeros around it up to a size that the network takes."""
    planes = []
    for plane in image.unbind(2 + axis):
        size, divisible = plane.shape[2:], showing.get("divisible", 1)
        wanted = [showing.get("roi_size") or -(-n // divisible) * divisible for n in size]
        (top, bottom), (left, right) = ((gap // 2, gap - gap // 2) for gap in np.subtract(wanted, size).tolist())
        logits = network(F.pad(plane, (left, right, top, bottom)))
        planes.append(logits[..., top : top + size[0], left : left + size[1]])
    return torch.stack(planes, dim=2 + axis)


def check(network: nn.Module, showing: dict, image: torch.Tensor) -> None:
    with torch.inference_mode():
        expected = [by_hand(image, network, axis, showing) for axis in AXES]
        for axis in AXES:
            strategy = Slices(axis, batch_size=3, **showing)
            logits, labels = strategy(image, network), strategy.label_map(image, network)
            assert_close_to(expected[axis], logits)
            assert torch.equal(labels.long(), logits.argmax(1, keepdim=True))
        fused = Slices(AXES, batch_size=3, **showing)(image, network)
    mean = torch.stack([logits.softmax(1) for logits in expected]).mean(0)
    assert_close_to(mean.log(), fused)


def assert_close_to(expected: torch.Tensor, found: torch.Tensor) -> None:
    """Within a hundredth of how much a class varies over the voxels, so that no slice could be another."""
    spread = float(expected.std(dim=(2, 3, 4)).max())
    assert spread > 1e-5
    torch.testing.assert_close(found, expected, rtol=0, atol=0.01 * spread)


def test_every_semantic_network_is_tried():
    assert {name for name, _ in CONFIGURATIONS} == set(NETWORKS) - NOT_SEMANTIC


def test_slices_of_a_made_up_ct(subject):
    check(*subject, ct())


@pytest.fixture(scope="module")
def real_ct() -> torch.Tensor:
    """(1, 1, 9, 7, 3), 0 to 1: voxels of a chest, far from each other."""
    array = read_volume(shared("data", "acrin-nsclc-fdg-pet-042", "acrin_042_ct.nii.gz")).array
    return scaled(array[40:300:30, 60:260:30, 20:80:20])


def test_slices_of_a_real_ct(subject, real_ct):
    check(*subject, real_ct)


@pytest.mark.parametrize(
    ("name", "arguments", "size"), [("deconvnet", {"width": 1 / 32}, (224, 224)), ("unet", {"spatial_dims": 2}, None)]
)
def test_slices_of_a_size_that_a_network_does_not_take(name, arguments, size):
    network = build(name, in_channels=1, out_channels=CLASSES, **arguments).eval()
    with pytest.raises(ValueError, match="the next size that it takes is"):
        Slices()(torch.zeros(1, 1, 37, 41, 2), network)

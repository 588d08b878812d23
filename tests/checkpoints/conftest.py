"""Files of weights in the layouts that releases and repositories write, and small networks to load them into."""

from __future__ import annotations

import pytest
import torch

from medseg3d.networks.swin_unetr import SwinUNETR
from medseg3d.networks.unetr import UNETR
from tests.parity.golden import fill

SMALL_VIT = {"in_channels": 1, "img_size": 32, "patch_size": 16, "hidden_size": 48, "mlp_dim": 96, "num_heads": 4}
SMALL_UNETR = {"out_channels": 2, "feature_size": 8} | {k: v for k, v in SMALL_VIT.items() if k != "patch_size"}


def filled(network, seed=7):
    """The network with other values in every tensor than it was built with; in eval mode."""
    fill(network, seed)
    return network.eval()


def swin(**arguments):
    return SwinUNETR(**{"in_channels": 1, "out_channels": 2, "feature_size": 12, **arguments}).eval()


def unetr(**arguments):
    return UNETR(**{**SMALL_UNETR, **arguments}).eval()


def assert_same(ours, expected):
    """Two mappings hold the same tensors under the same names, to the bit."""
    assert ours.keys() == expected.keys()
    different = [key for key in ours if not torch.equal(ours[key], expected[key])]
    assert not different


def copy_of(network):
    return {key: tensor.clone() for key, tensor in network.state_dict().items()}


@pytest.fixture
def write(tmp_path):
    """write(content, name) -> the path of a file that torch.save wrote."""

    def write_file(content, name="weights.pt"):
        path = tmp_path / name
        torch.save(content, path)
        return path

    return write_file

"""A file of plain PyTorch tells the order of patch merging too."""

from __future__ import annotations

import pytest
import torch

from medseg3d.checkpoints import load_checkpoint
from medseg3d.networks import SwinUNETR


@pytest.mark.parametrize("order", ["legacy", "merging", "mergingv2"])
def test_torch_save_keeps_the_order(order, tmp_path):
    trained = SwinUNETR(1, 2, feature_size=12, downsample=order)
    torch.save({"state_dict": trained.state_dict()}, tmp_path / "model.pt")
    network = SwinUNETR(1, 2, feature_size=12)
    report = load_checkpoint(network, tmp_path / "model.pt")
    assert network.merging_order == order
    assert report.complete

"""A head is taken off a network only where nothing can tell."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from medseg3d.inference import SubVolumes
from medseg3d.inference.heads import split_head
from medseg3d.inference.slabs import Slab


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Headed(nn.Module):
    def __init__(self, features=4, classes=9):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Conv3d(1, features, 3, padding=1)
        self.head = nn.Conv3d(features, classes, 1)

    def forward(self, x):
        return self.head(torch.relu(self.body(x)))


class Indexes(Headed):
    def forward(self, x):
        y = super().forward(x)
        return torch.stack([y[:, k] for k in range(9)], 1)


class Asserts(Headed):
    def forward(self, x):
        y = super().forward(x)
        assert y.shape[1] == 9
        return y


class Scaled(Headed):
    def forward(self, x):
        return super().forward(x) * (1 + x)


class Clamped(Headed):
    def forward(self, x):
        return super().forward(x).clamp(-0.5, 0.5)


class Locked(Headed):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


def test_a_head_is_found():
    network, window = Headed().eval(), noise(1, 1, 6, 6, 6)
    with torch.no_grad():
        body, head = split_head(network, window)
        torch.testing.assert_close(head(body(window)[0].flatten(1)), network(window)[0].flatten(1))
    assert body.body.weight is network.body.weight and type(network.head) is nn.Conv3d


@pytest.mark.parametrize("network", [Indexes(), Asserts(), Scaled(), Clamped(), Locked(), Headed(9, 4)])
def test_what_is_no_head_stays(network):
    """Also where the image begins with air, in which much cannot be told apart."""
    image = noise(1, 1, 24, 9, 9) * 5
    image[:, :, :8] = 0
    network.eval()
    strategy = SubVolumes(6, 0.5)
    with torch.no_grad():
        assert all(slab.head is None for slab in strategy.slabs(image, network))
        assert torch.equal(strategy.label_map(image, network), strategy(image, network).argmax(1, keepdim=True))


@pytest.mark.parametrize("classes", [4, 9])
def test_labels_where_gradients_are_on(classes):
    labels = SubVolumes(6).label_map(noise(1, 1, 8, 8, 8), Headed(5, classes).eval())
    assert not labels.requires_grad


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("last", [False, True])
def test_blocks_are_parts_of_the_slab(axis, last, monkeypatch):
    monkeypatch.setattr("medseg3d.inference.slabs.BLOCK", 100)
    full = noise(20, 21, 22, 5).movedim(-1, 0) if last else noise(5, 20, 21, 22)
    slab = Slab(axis, 3, full.narrow(1 + axis, 3, 7))
    together = torch.cat([logits for _, logits in slab.blocks()], 1)
    assert torch.equal(together, slab.values.flatten(1))
    assert max(logits.shape[1] for _, logits in slab.blocks()) <= 100
    assert torch.equal(slab.labels().long(), slab.values.argmax(0))

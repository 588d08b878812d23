"""Nothing in the loops over windows and slices waits for the device or leaves it.

On a CPU there is no device to wait for, but the operations that would are the same: those that hand a value to Python,
find a size by looking at values, make a tensor of Python's numbers or change where a tensor lies. They may come once a
slab, but not once a window.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from medseg3d.inference import Downsampled, Slices, SubVolumes
from medseg3d.inference.augmentation import Flips
from medseg3d.inference.device import Returning
from medseg3d.inference.grid_map import edge_to_edge
from medseg3d.inference.onto_grid import labels_onto

WAITING = {"_local_scalar_dense", "nonzero", "_to_copy", "lift_fresh", "is_nonzero", "equal", "masked_select"}
MADE = {"arange", "zeros", "ones", "full", "eye", "linspace"}  # on the CPU, unless a device was named


class Waits(TorchDispatchMode):
    """Counts operations that wait for a device, or make what must be sent there."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        if name in WAITING | MADE:
            self.found[name] += 1
        return function(*args, **kwargs or {})


def waits(run):
    with torch.no_grad(), Waits() as mode:
        run()
    return mode.found


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def exhaust(slabs):
    for _ in slabs:
        pass


NETWORK = nn.Conv3d(1, 3, 3, padding=1).eval()
FEATURES = nn.Sequential(nn.Conv3d(1, 2, 3, padding=1), nn.Conv3d(2, 5, 1)).eval()
MIRRORED = Flips(NETWORK, axes=(0,), pairs=[(1, 2)])


@pytest.mark.parametrize("network", [NETWORK, FEATURES, MIRRORED])
@pytest.mark.parametrize("options", [{}, {"batch_size": 3}, {"accumulate": torch.float32, "device": "cpu"}])
def test_windows_do_not_wait(network, options):
    """As many layers of windows, with more windows in each."""
    strategy = SubVolumes(8, 0.5, **options)
    few, many = noise(1, 1, 40, 12, 12), noise(1, 1, 40, 24, 24)
    assert strategy.count(many.shape[2:]) >= 4 * strategy.count(few.shape[2:])
    waits(lambda: exhaust(strategy.slabs(few, network)))  # what is made once, is made
    assert waits(lambda: exhaust(strategy.slabs(many, network))) == waits(lambda: exhaust(strategy.slabs(few, network)))


def test_nor_do_those_that_give_logits():
    strategy = SubVolumes(8, 0.5, batch_size=2)
    few, many = noise(1, 1, 12, 12, 12), noise(1, 1, 30, 30, 30)
    assert waits(lambda: strategy(many, NETWORK)) == waits(lambda: strategy(few, NETWORK))


def test_labels_on_another_grid_wait_once_a_slab_and_not_once_a_window():
    strategy = SubVolumes(8, 0.5)

    def waiting(size):
        image = noise(1, 1, *size)
        maps = edge_to_edge(size, [size[0], size[1] + 3, size[2] + 3])
        found = waits(lambda: labels_onto(strategy.slabs(image, NETWORK), maps))
        return found["_local_scalar_dense"], found["nonzero"]

    few, many, long = waiting((40, 12, 12)), waiting((40, 20, 20)), waiting((80, 12, 12))
    assert few == many != (0, 0) and long[0] > few[0]


def test_slices_do_not_wait_but_for_their_labels():
    network = nn.Conv2d(3, 4, 3, padding=1).eval()
    strategy = Slices(neighbours=1, batch_size=2)

    def waiting(slices):
        found = waits(lambda: exhaust(strategy.slabs(noise(1, 1, 10, 10, slices), network)))
        return {name: found[name] for name in ("_local_scalar_dense", "nonzero", "lift_fresh", "_to_copy")}

    assert waiting(30) == waiting(10)


def test_a_downsampled_image_waits_as_often_whatever_its_size():
    strategy = Downsampled((8, 8, 8))
    few, many = (waits(lambda size=size: strategy.small(noise(1, 1, *[size] * 3), FEATURES)) for size in (16, 40))
    assert few == many


@pytest.mark.parametrize(
    ("extra", "name"),
    [
        (lambda window: window * window.max().item(), "_local_scalar_dense"),
        (lambda window: window * torch.tensor(2.0), "lift_fresh"),
        (lambda window: window.double().float(), "_to_copy"),
        (lambda window: window + torch.zeros(()), "zeros"),
    ],
)
def test_what_waits_is_seen(extra, name):
    class Waiting(nn.Conv3d):
        def forward(self, window):
            return super().forward(extra(window))

    network = Waiting(1, 3, 3, padding=1).eval()
    strategy = SubVolumes(8, 0.5)
    few, many = (waits(lambda w=w: exhaust(strategy.slabs(noise(1, 1, 24, w, w), network))) for w in (12, 24))
    assert many[name] > few[name] > 0


def test_parts_fill_an_array():
    labels = Returning(np.zeros((3, 4), np.uint8))
    labels.put((slice(1, 3), slice(0, 2)), torch.ones(2, 2, dtype=torch.uint8))
    labels.array = labels.array.astype(np.uint16)
    labels.put((slice(0, 1), slice(3, 4)), torch.tensor([[300]], dtype=torch.int32))
    np.testing.assert_array_equal(labels.all(), [[0, 0, 0, 300], [1, 1, 0, 0], [1, 1, 0, 0]])


# On a device


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("classes", [5, 300])
@torch.no_grad()
def test_labels_from_a_device_are_those_of_the_cpu(classes):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.Conv3d(4, classes, 1)).eval()
    image, strategy = noise(1, 1, 60, 40, 40), SubVolumes(16, 0.5, batch_size=2)
    maps = edge_to_edge((60, 40, 40), (90, 55, 47))
    expected = labels_onto(strategy.slabs(image, network), maps)
    found = labels_onto(strategy.slabs(image.cuda(), network.cuda()), maps)
    assert found.dtype == expected.dtype and np.mean(found == expected) > 0.999


@pytest.mark.gpu
@needs_cuda
@torch.no_grad()
def test_a_downsampled_image_on_a_device():
    image, strategy = noise(1, 1, 40, 40, 40), Downsampled((16, 16, 16))
    expected = strategy.label_map(image, FEATURES)
    found = strategy.label_map(image.cuda(), FEATURES.cuda())
    FEATURES.cpu()
    assert found.is_cuda and (found.cpu() == expected).float().mean() > 0.999

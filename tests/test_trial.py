"""A window, and what follows the network, tried before a scan: what is run, counted and scaled."""

from __future__ import annotations

import gc
import time

import numpy as np
import pytest
import torch
from torch import nn

from medseg3d import trial
from medseg3d.inference import Downsampled, Slices, SubVolumes
from medseg3d.inference.grid_map import edge_to_edge
from medseg3d.trial import Afterwards, WindowCost, measure_window, peak_memory

IMAGE = torch.zeros(1, 1, 40, 24, 24)


@pytest.mark.parametrize(
    ("strategy", "shape"),
    [
        (SubVolumes(16, batch_size=3), (3, 1, 16, 16, 16)),
        (Slices(batch_size=4), (4, 1, 40, 24)),
        (Downsampled((8, 8, 8)), (1, 1, 8, 8, 8)),
    ],
)
def test_one_batch_is_tried_as_the_strategy_gives_it(strategy, shape):
    seen = []

    def network(batch):
        seen.append(tuple(batch.shape))
        return torch.cat([batch, batch, batch], 1)

    cost = measure_window(strategy, IMAGE, network)
    assert seen == [shape] * 2 and cost.channels == 3
    assert cost.seconds > 0 and cost.labelling > 0 and cost.ram >= 0 and cost.vram == 0


def test_channels_are_those_before_the_head_where_it_is_taken_off():
    network = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.Conv3d(4, 50, 1)).requires_grad_(False).eval()
    image = torch.randn(1, 1, 40, 24, 24)
    assert measure_window(SubVolumes(16), image, network).channels == 4
    assert measure_window(SubVolumes((40, 24, 24)), image, network).channels == 50, "not worth it for one window"


def test_memory_of_a_window_is_measured():
    size = 256 * 2**20  # beside which what is freed meanwhile is little
    gc.collect()

    def network(batch):
        held = torch.ones(size // 4)
        return torch.cat([batch, batch], 1) * held[0]

    assert 0.7 * size < measure_window(SubVolumes(16), IMAGE, network).ram < 2 * size
    with peak_memory(torch.device("cpu")) as peak:
        pass
    assert peak.ram < size / 2, "each count begins anew"


def test_what_follows_is_tried_on_a_part_and_counted_for_the_scan():
    """The step gets labels with as many voxels a voxel of the network as the scan has; time and memory are scaled."""
    seen = []
    maps = edge_to_edge((20, 10, 10), (40, 20, 20))
    follows = Afterwards(maps, steps={"write": lambda labels: (seen.append(labels), time.sleep(0.02))})
    cost = WindowCost(1.0, 0.0, 0, 0, 2, values=torch.randn(2, 8, 6, 10))
    seconds, _ = follows.tried(1, cost, 3, whole=False)
    (labels,) = seen
    assert labels.shape == (16, 12, 20) and set(seconds) == {"labels", "write"}
    assert seconds["write"] >= 0.02 * (40 * 20 * 20) / labels.size


def test_a_map_of_uncertainty_is_tried_too():
    labels, maps = [], []
    follows = Afterwards(
        edge_to_edge((20, 10, 10), (40, 20, 20)),
        steps={"write": labels.append},
        uncertainty="margin",
        steps_of_map={"write": lambda unsure: (maps.append(unsure), time.sleep(0.02))},
    )
    cost = WindowCost(1.0, 0.0, 0, 0, 2, values=torch.randn(2, 8, 6, 10))
    seconds, _ = follows.tried(1, cost, 3, whole=False)
    assert maps[0].shape == labels[0].shape and maps[0].dtype == np.float32 and 0 < maps[0].mean() < 1
    assert set(seconds) == {"labels", "write"} and seconds["write"] >= 0.02 * (40 * 20 * 20) / labels[0].size


def test_what_follows_is_tried_on_a_whole_small_image(monkeypatch):
    monkeypatch.setattr(trial, "_TRIED", 1000)
    seen = []
    follows = Afterwards(edge_to_edge((40, 40, 40), (80, 80, 80)), steps={"write": seen.append})
    follows.tried(0, WindowCost(1.0, 0.0, 0, 0, 2, values=torch.randn(2, 10, 10, 10)), 3, whole=True)
    assert seen[0].shape[1:] == (80, 80) and seen[0].shape[0] == 8, "one of ten slices, each 8 times as fine"

"""Uncertainty made slab by slab is that of the full logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats
from torch import nn

from medseg3d.inference import SubVolumes, slabs
from medseg3d.inference.slabs import Head, Slab
from medseg3d.inference.uncertainty import entropy, label_map_with_uncertainty, margin, probabilities


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def naive(logits, kind):
    """scipy on the logits (K, ...) in float64."""
    p = special.softmax(np.asarray(logits, np.float64), axis=0)
    if kind == "entropy":
        return stats.entropy(p, axis=0) / np.log(len(p))
    ordered = np.sort(p, axis=0)
    return ordered[-1] - ordered[-2]


KINDS = {"entropy": entropy, "margin": margin}


@pytest.fixture(name="small_blocks")
def small_blocks_fixture(monkeypatch):
    monkeypatch.setattr(slabs, "BLOCK", 50)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_head", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_slab_gives_what_scipy_gives_for_its_logits(kind, with_head, channels_last):
    head = Head(noise(7, 4, seed=1), noise(7, seed=2)) if with_head else None
    values = noise(4, 3, 9, 8) * 4
    if channels_last:
        values = values.movedim(0, -1).contiguous().movedim(-1, 0)
    slab = Slab(0, 5, values, head)
    before = values.clone()
    result = KINDS[kind](slab)
    np.testing.assert_allclose(result, naive(slab.logits(), kind), atol=2e-6)
    torch.testing.assert_close(probabilities(slab), slab.logits().softmax(0))
    assert torch.equal(values, before)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(2, 9)
    .flatmap(
        lambda classes: st.lists(
            st.lists(st.floats(-200, 200, width=32), min_size=classes, max_size=classes), min_size=1
        )
    )
    .filter(lambda rows: len({len(row) for row in rows}) == 1)
)
def test_both_lie_between_0_and_1_and_match_scipy(rows):
    logits = torch.tensor(rows).T[:, :, None]
    for kind, of in KINDS.items():
        result = of(Slab(0, 0, logits))
        assert result.min() >= 0 and result.max() <= 1
        np.testing.assert_allclose(result, naive(logits, kind), atol=1e-5)


def test_the_ends_of_the_scales():
    certain, even = torch.tensor([[[0.0], [1e4], [-1e4]]]).movedim(0, -1), torch.ones(3, 1, 1)
    assert entropy(Slab(0, 0, certain)) == 0 and margin(Slab(0, 0, certain)) == 1
    assert entropy(Slab(0, 0, even)) == pytest.approx(1) and margin(Slab(0, 0, even)) == 0
    tie = torch.tensor([5.0, 5.0, -1e4]).view(3, 1, 1)
    assert entropy(Slab(0, 0, tie)) == pytest.approx(np.log(2) / np.log(3)) and margin(Slab(0, 0, tie)) == 0
    excluded = torch.tensor([5.0, 4.0, -float("inf")]).view(3, 1, 1)  # a class that a network rules out
    for kind, of in KINDS.items():
        assert float(of(Slab(0, 0, excluded))) == pytest.approx(float(naive(excluded, kind)[0, 0]), abs=1e-6)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [3, 12])
@pytest.mark.parametrize("shape", [(2, 1, 14, 9, 8), (1, 1, 15, 12)])
def test_labels_and_uncertainty_of_a_whole_image(kind, classes, shape):
    """Twelve classes of five channels: the head comes after blending."""
    torch.manual_seed(0)
    dims = len(shape) - 2
    conv = nn.Conv3d if dims == 3 else nn.Conv2d
    network = nn.Sequential(conv(1, 5, 3, padding=1), nn.ReLU(), conv(5, classes, 1)).eval()
    strategy, image = SubVolumes(6, 0.5), noise(*shape)
    with torch.no_grad():
        labels, uncertainty = label_map_with_uncertainty(strategy, image, network, kind, torch.float32)
        logits = strategy(image, network)
        assert torch.equal(labels, strategy.label_map(image, network))
    assert torch.equal(labels, logits.argmax(1, keepdim=True)) and labels.dtype == torch.uint8
    assert uncertainty.shape == (len(image), 1, *shape[2:])
    for b in range(len(image)):
        np.testing.assert_allclose(uncertainty[b, 0], naive(logits[b], kind), atol=1e-5)


def test_each_window_runs_once():
    runs = []

    def network(window):
        runs.append(len(window))
        return torch.cat([window, -window], dim=1)

    label_map_with_uncertainty(SubVolumes(4, 0), noise(1, 1, 8, 8), network)
    assert sum(runs) == 4


def test_gradients_are_not_kept():
    network = nn.Conv2d(1, 3, 1).eval()
    labels, uncertainty = label_map_with_uncertainty(SubVolumes(4), noise(1, 1, 8, 8), network, dtype=torch.float32)
    assert not uncertainty.requires_grad and labels.shape == uncertainty.shape


def test_half_precision_is_close_and_the_default():
    image = noise(1, 1, 10, 10)

    def network(window):
        return torch.cat([window, -window, 2 * window], dim=1)

    for kind in KINDS:
        _, exact = label_map_with_uncertainty(SubVolumes(6), image, network, kind, torch.float32)
        _, half = label_map_with_uncertainty(SubVolumes(6), image, network, kind)
        assert half.dtype == torch.float16
        torch.testing.assert_close(half.float(), exact, rtol=0, atol=2**-12)
    slab = Slab(0, 0, noise(3, 4, 4))
    torch.testing.assert_close(probabilities(slab, torch.float16).float(), probabilities(slab), rtol=0, atol=2**-12)


def test_a_meta_tensor_gives_two_with_its_place():
    from monai.data import MetaTensor

    affine = torch.diag(torch.tensor([2.0, 1.5, 3.0, 1.0], dtype=torch.float64))
    image = MetaTensor(noise(1, 1, 8, 8, 8), affine=affine)
    for result in label_map_with_uncertainty(SubVolumes(6), image, lambda x: torch.cat([x, -x], 1)):
        assert isinstance(result, MetaTensor) and result.shape == (1, 1, 8, 8, 8)
        torch.testing.assert_close(result.affine, affine)


@pytest.mark.parametrize(
    ("network", "kind", "message"),
    [
        (lambda x: torch.cat([x, x], 1), "variance", "kind must be one of entropy, margin, got 'variance'"),
        (lambda x: x, "margin", "gives one channel: it needs two or more"),
        (lambda x: torch.cat([x, x * float("nan")], 1), "entropy", "not a number"),
    ],
)
def test_what_has_no_uncertainty_is_told(network, kind, message):
    with pytest.raises(ValueError, match=message):
        label_map_with_uncertainty(SubVolumes(4), noise(1, 1, 6, 6), network, kind)

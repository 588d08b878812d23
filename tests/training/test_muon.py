"""Muon: steps by orthogonal matrices."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from medseg3d.networks.swin_unetr import SwinUNETR
from medseg3d.training import Muon
from medseg3d.training.muon import orthogonalised, split


@pytest.mark.parametrize("shape", [(8, 40), (40, 8), (12, 12), (1, 5)])
def test_a_step_is_the_nearest_orthogonal_matrix_within_the_bounds_of_the_iteration(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonalised(matrix)
    assert found.dtype == torch.float32
    of_found = torch.linalg.svdvals(found)
    assert of_found.min() > 0.6 and of_found.max() < 1.3  # a hundredth of the largest value already comes to 0.7
    in_its_bases = left.T @ found.double() @ right.T
    torch.testing.assert_close(in_its_bases, in_its_bases.diag().diag(), atol=1e-4, rtol=0)


def test_a_zero_gradient_moves_nothing():
    assert torch.equal(orthogonalised(torch.zeros(3, 4)), torch.zeros(3, 4))


def test_the_iteration_on_products_is_that_on_the_matrix():
    matrix = torch.randn(6, 50, generator=torch.Generator().manual_seed(1))
    plain = matrix / matrix.norm()
    for _ in range(5):
        products = plain @ plain.T
        plain = 3.4445 * plain + (-4.7750 * products + 2.0315 * products @ products) @ plain
    torch.testing.assert_close(orthogonalised(matrix), plain, atol=1e-4, rtol=1e-4)


def test_weights_of_layers_are_told_from_the_rest():
    network = SwinUNETR(in_channels=1, out_channels=3, feature_size=12)
    matrices, others = split(network)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    assert len(matrices) + len(others) == len(names)
    assert all(name.endswith("weight") for name in (names[id(one)] for one in matrices))
    assert any("qkv" in names[id(one)] for one in matrices)
    assert any("relative_position_bias" in names[id(one)] for one in others)
    next(iter(network.parameters())).requires_grad_(False)
    assert sum(map(len, split(network))) == len(names) - 1
    assert [len(one) for one in split(nn.Conv3d(4, 4, 3, groups=4))] == [0, 2]  # depth-wise: no channels are mixed


def test_steps_of_the_first_kind_have_the_size_of_adamws():
    layer = nn.Conv3d(6, 8, 3, bias=False)
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.randn(before.shape, generator=torch.Generator().manual_seed(2)) * 1e-5
    Muon(layer, lr=0.1, weight_decay=0.5).step()
    step = layer.weight.detach() - before * (1 - 0.1 * 0.5)
    assert step.square().mean().sqrt().item() == pytest.approx(0.1 * 0.2, rel=0.2)
    assert (step * layer.weight.grad).sum() < 0


def test_other_parameters_get_adams_steps():
    norm, twin = nn.BatchNorm1d(5), nn.BatchNorm1d(5)
    ours = Muon(norm, lr=0.01, betas=(0.8, 0.95))
    theirs = torch.optim.Adam(twin.parameters(), lr=0.01, betas=(0.8, 0.95))
    for step in range(4):
        for parameter, other in zip(norm.parameters(), twin.parameters(), strict=True):
            parameter.grad = torch.randn(5, generator=torch.Generator().manual_seed(step))
            other.grad = parameter.grad.clone()
        ours.step(), theirs.step()
    for parameter, other in zip(norm.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, other)


def test_a_state_that_was_saved_goes_on_as_if_nothing_had_been():
    def steps(network, optimizer, count, seed):
        for number in range(count):
            x = torch.randn(7, 4, generator=torch.Generator().manual_seed(seed + number))
            optimizer.zero_grad()
            network(x).square().mean().backward()
            optimizer.step()

    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    optimizer = Muon(network)
    steps(network, optimizer, 3, 0)
    other = copy.deepcopy(network)
    resumed = Muon(other, lr=1.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(network, optimizer, 3, 10)
    steps(other, resumed, 3, 10)
    for one, two in zip(network.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"lr": -1}, "lr and weight_decay"), ({"momentum": 1.0}, "momentum and betas"), ({"betas": (0.9, 1)}, "betas")],
)
def test_settings_out_of_range(settings, words):
    with pytest.raises(ValueError, match=words):
        Muon(nn.Linear(2, 2), **settings)


def test_nothing_to_train():
    with pytest.raises(ValueError, match="nothing to train"):
        Muon(nn.Linear(2, 2).requires_grad_(False))

"""Turned and cut views of sub-volumes: what they keep, what they change, and that the caller's tensors stay."""

from __future__ import annotations

import pytest
import torch

from medseg3d.data.views import cut_out, random_boxes, turn_at_random


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", [(24, 1, 5, 5), (24, 2, 6, 6, 3)])
def test_turning_back_gives_the_image(shape):
    images = torch.randn(shape, generator=seeded())
    before = images.clone()
    turned, turns = turn_at_random(images, seeded(1))
    assert set(turns.tolist()) == {0, 1, 2, 3} and turns.dtype == torch.int64
    for one, back, n in zip(images, turned, turns.tolist(), strict=True):
        assert torch.equal(torch.rot90(back, -n, (1, 2)), one)
        assert torch.equal(back, one) == (n == 0)
    assert torch.equal(images, before)


def test_the_axis_along_the_body_stays():
    images = torch.zeros(8, 1, 4, 4, 6) + torch.arange(6.0)
    assert torch.equal(turn_at_random(images, seeded())[0], images)


@pytest.mark.parametrize("shape", [(2, 1, 4, 5, 5), (2, 4, 4)])
def test_what_cannot_be_turned_is_refused(shape):
    with pytest.raises(ValueError, match="two first spatial axes of one length"):
        turn_at_random(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(64, 64, 64), (40, 56), (33, 64, 20)])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_boxes_cover_their_share_and_hardly_more(shape, share):
    largest = torch.tensor(shape).mul(0.25).ceil().prod().item() / torch.tensor(shape).prod().item()
    for seed in range(3):
        covered = random_boxes(shape, share, seeded(seed)).float().mean().item()
        assert share <= covered < share + largest or covered == share == 0


def test_boxes_reach_every_border():
    hit = torch.stack([random_boxes((16, 16, 16), 0.3, seeded(n)) for n in range(10)]).any(dim=0)
    assert all(hit.select(axis, side).any() for axis in range(3) for side in (0, -1))


def test_noise_and_pieces_of_another_image():
    images = torch.stack([torch.full((1, 32, 32, 32), 100.0 * n) for n in range(4)])
    images += torch.randn(images.shape, generator=seeded())
    before = images.clone()
    cut = cut_out(images, 0.3, seeded(3))
    assert torch.equal(images, before)
    pieces = []
    for number, (one, own) in enumerate(zip(cut, images, strict=True)):
        changed = one != own
        assert 0.3 <= changed.float().mean() < 0.6  # of two masks of 0.3 that overlap
        pieces += [other for other in range(4) if other != number and (one == images[other]).float().mean() > 0.2]
        noise = one[changed & ~torch.stack([one == other for other in images]).any(dim=0)]
        assert abs(noise.mean() - own.mean()) < 0.1 and noise.std() == pytest.approx(own.std().item(), rel=0.1)
    assert pieces  # with this seed at least one image has boxes of another


def test_an_image_alone_has_noise_alone():
    image = torch.randn(1, 2, 24, 40, generator=seeded())
    cut = cut_out(image, 0.5, seeded(1))
    changed = (cut != image).any(dim=1)
    assert 0.5 <= changed.float().mean() < 0.57
    assert torch.equal((cut != image).all(dim=1), changed)  # all channels together


def test_the_same_generator_gives_the_same_views():
    images = torch.randn(3, 1, 16, 16, 16, generator=seeded())
    assert torch.equal(cut_out(images, generator=seeded(5)), cut_out(images, generator=seeded(5)))
    assert not torch.equal(cut_out(images, generator=seeded(5)), cut_out(images, generator=seeded(6)))
    assert torch.equal(cut_out(images, 0.0), images)


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        cut_out(torch.zeros(2, 1, 8, 8), share)

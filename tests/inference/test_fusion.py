"""Coarse to fine: votes, clean-up, boxes and the iteration, on masks worked by hand."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from medseg3d.inference import CoarseToFine, Slices
from medseg3d.inference.coarse_to_fine import dice, slice_boxes
from medseg3d.inference.fusion import at_least, fused_mask, keep_seeded, strictest
from medseg3d.networks.unet import UNet


def bright(slices):
    """The organ's logit in a slice or in a stack of slices: what is brighter than 0.5."""
    return 20 * (slices - 0.5)


def centre(slices):
    return bright(slices[:, slices.shape[1] // 2, None])


def two_classes(slices):
    organ = centre(slices)
    return torch.cat([torch.zeros_like(organ), organ], dim=1)


def ball(shape=(18, 20, 16), middle=(9, 10, 8), radius=5.2):
    axes = np.meshgrid(*[np.arange(n) - m for n, m in zip(shape, middle, strict=True)], indexing="ij")
    return sum(axis**2 for axis in axes) <= radius**2


def image_of(mask):
    return torch.from_numpy(mask).float()[None, None]


def test_votes():
    masks = [np.array(mask, bool) for mask in ([1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0])]
    assert [at_least(votes, masks).tolist() for votes in (1, 2, 3)] == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]]
    assert strictest(masks).tolist() == [1, 0, 0, 0]
    masks[2][0] = False
    assert strictest(masks).tolist() == [1, 1, 0, 0]
    masks[1][:2] = False
    assert strictest(masks).tolist() == [1, 1, 1, 0]
    assert fused_mask(masks[:1]).tolist() == [1, 1, 1, 0]  # one axis alone: its own majority


def test_pieces_that_share_an_edge_only_are_two():
    mask = np.zeros((8, 8, 8), bool)
    mask[1, 1, 1:4] = mask[2, 2, 1:3] = True
    seeds = np.zeros_like(mask)
    seeds[2, 2, 1] = True
    assert keep_seeded(mask, seeds).sum() == 2
    seeds[1, 1, 1] = True
    assert keep_seeded(mask, seeds, min_share=2 / 3).sum() == 5
    assert keep_seeded(mask, seeds, min_share=0.7).sum() == 3
    assert not keep_seeded(mask, np.zeros_like(mask)).any()


def test_what_is_empty_or_fills_half_of_the_image_comes_back_as_it_is():
    mask, no_seeds = np.zeros((2, 2, 5), bool), np.zeros((2, 2, 5), bool)
    assert not keep_seeded(mask, ~no_seeds).any()
    mask[0] = True
    assert (keep_seeded(mask, no_seeds) == mask).all()
    mask[0, 0, 0] = False
    assert not keep_seeded(mask, no_seeds).any()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), share=st.floats(0, 1), density=st.floats(0, 0.45))
def test_what_is_kept_is_whole_pieces_and_stays_when_cleaned_again(seed, share, density):
    random = np.random.default_rng(seed)
    mask, seeds = random.random((2, 7, 6, 8)) < density
    before = mask.copy()
    kept = keep_seeded(mask, seeds, share)
    assert (mask == before).all() and not (kept & ~mask).any()
    np.testing.assert_array_equal(keep_seeded(kept, seeds, share), kept)
    dropped = mask & ~kept
    for axis in range(3):  # no kept voxel shares a face with a dropped one
        one, other = np.delete(kept, 0, axis), np.delete(dropped, -1, axis)
        assert not (one & other).any() and not (np.delete(kept, -1, axis) & np.delete(dropped, 0, axis)).any()


@pytest.mark.parametrize("neighbours", [0, 1, 2])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_boxes_hold_the_mask_of_their_stack_tightly(axis, neighbours):
    mask = ball()
    boxes = slice_boxes(mask, axis, neighbours, margin=0)
    slices = np.moveaxis(mask, axis, 0)
    for number in range(len(slices)):
        stack = slices[max(number - neighbours, 0) : number + neighbours + 1].any(axis=0)
        assert (number in boxes) == stack.any()
        if number in boxes:
            assert stack[boxes[number]].sum() == stack.sum()
            assert stack[boxes[number]].any(0).all() and stack[boxes[number]].any(1).all()


def test_boxes_grow_as_far_as_the_image_goes():
    mask = np.zeros((3, 10, 12), bool)
    mask[1, 2, 8] = True
    assert slice_boxes(mask, 0, 0, margin=3) == {1: (slice(0, 6), slice(5, 12))}
    assert slice_boxes(mask, 2, 0, margin=0) == {8: (slice(1, 2), slice(2, 3))}
    assert slice_boxes(np.zeros((3, 3), bool), 0) == {}
    assert slice_boxes(np.eye(3, dtype=bool), 1, 0, margin=0) == {n: (slice(n, n + 1),) for n in range(3)}


def test_dice():
    one, other = np.array([1, 1, 0, 0], bool), np.array([0, 1, 1, 0], bool)
    assert dice(one, other) == 0.5 and dice(one, one) == 1.0 and dice(one, ~one) == 0.0
    assert dice(one & False, one & False) == 1.0  # nothing changes any more


@pytest.mark.parametrize("network", [centre, two_classes, bright])
def test_networks_that_are_right_find_the_organ_in_one_round(network):
    mask = ball()
    strategy = CoarseToFine(Slices((0, 1, 2), neighbours=1, batch_size=4), margin=2)
    rounds = list(strategy.rounds(image_of(mask), network))
    assert [one.number for one in rounds] == [0, 1] and math.isnan(rounds[0].dice) and rounds[1].dice == 1.0
    assert all((one.mask == mask).all() for one in rounds)
    labels = strategy.label_map(image_of(mask), network)
    assert labels.dtype == torch.uint8 and (labels[0, 0].numpy() == mask).all()
    assert torch.equal(strategy(image_of(mask), network).argmax(1, keepdim=True), labels.long())


def test_the_mean_of_a_stack_fades_in_fine_rounds():
    """The first and the last slice lie in two stacks: of two in the coarse round, of three in the fine one."""
    image = image_of(np.ones((5, 9, 9), bool))
    strategy = CoarseToFine(Slices(0, neighbours=1), margin=1, min_share=0, max_rounds=1)

    def network(slices):
        organ = torch.full_like(slices, -20.0)
        organ[:, :, 3:6, 3:6] = 0.6  # probability 0.65, of which two thirds are 0.43
        return organ

    coarse, fine = strategy.rounds(image, {"coarse": network, "fine": lambda s: torch.full_like(s, 0.6)})
    inside = np.zeros((5, 9, 9), bool)
    inside[:, 3:6, 3:6] = True
    assert (coarse.mask == inside).all()
    looked = np.zeros_like(inside)
    looked[1:-1, 2:7, 2:7] = True  # the box with its margin, but not the first and the last slice
    assert (fine.mask == looked).all()


@pytest.mark.parametrize(("probabilities", "found"), [((0.9, 0.4, 0.3), True), ((0.6, 0.6, 0.2), False)])
def test_axes_are_voted_on_at_first_and_averaged_then(probabilities, found):
    """Two axes of three say 0.6: a majority, but a mean below a half. One says 0.9: no majority, but a mean above."""
    mask = ball()

    def certain(probability):
        logit = math.log(probability / (1 - probability))
        return lambda slices: torch.where(slices[:, 1:2] > 0, logit, -20.0)

    networks = {"coarse": centre, "fine": [certain(p) for p in probabilities]}
    strategy = CoarseToFine(margin=2, max_rounds=1)
    _, fine = strategy.rounds(image_of(mask), networks)
    assert (fine.mask == (mask & found)).all()
    (coarse,) = CoarseToFine(max_rounds=0).rounds(image_of(mask), networks["fine"])
    assert (coarse.mask == (mask & (not found))).all()


def test_fine_networks_see_crops_around_the_last_mask():
    mask, seen = ball(), []

    def fine(slices):
        seen.append(tuple(slices.shape))
        return centre(slices)

    strategy = CoarseToFine(Slices(0, neighbours=1), margin=2)
    list(strategy.rounds(image_of(mask), {"coarse": centre, "fine": fine}))
    boxes = slice_boxes(mask, 0, 1, 2)
    assert seen == [(1, 3, *(part.stop - part.start for part in box)) for box in boxes.values()]


def test_the_slices_of_all_rounds_are_counted_at_most():
    seen = []
    strategy = CoarseToFine(Slices((0, -1), batch_size=3), max_rounds=4)
    image = torch.ones(1, 1, 5, 6, 7)  # of which every voxel is the organ, in every slice and round
    rounds = list(strategy.rounds(image, lambda slices: seen.append(len(slices)) or 20 * (slices - 0.5)))
    assert strategy.count(image.shape[2:]) == 5 * (5 + 7) and sum(seen) == len(rounds) * (5 + 7)


def test_rounds_go_on_until_the_mask_stays_or_there_were_enough():
    """A fine network that lets the organ grow by a voxel until it has the true size."""
    true, small = ball(), ball(radius=2.2)

    def grown(slices):
        inside = slices[:, 1:2]
        return 20 * (F.max_pool2d((inside > 1.5).float(), 3, 1, 1) * (inside > 0.5) - 0.5)

    def coarse(slices):
        return 20 * (slices[:, 1:2] - 1.5)

    image = image_of(true) + image_of(small)
    networks = {"coarse": coarse, "fine": grown}
    strategy = CoarseToFine(Slices((0, 1, 2), neighbours=1), margin=3, threshold=0.95, max_rounds=6)
    sizes = []
    for one in strategy.rounds(image, networks):
        image[0, 0] += torch.from_numpy(one.mask & (image[0, 0].numpy() < 2))  # in the next round the network sees it
        sizes.append(int(one.mask.sum()))
        last = one
    assert sizes[0] == small.sum() and sizes == sorted(sizes) and len(sizes) > 3
    assert last.dice >= 0.95 or last.number == 6
    few = list(CoarseToFine(margin=3, threshold=1.0, max_rounds=0).rounds(image_of(true), centre))
    assert [one.number for one in few] == [0]


def test_an_empty_mask_stays_empty():
    seen = []
    networks = {"coarse": centre, "fine": lambda slices: seen.append(slices) or centre(slices)}
    rounds = list(CoarseToFine().rounds(torch.zeros(1, 1, 5, 6, 7), networks))
    assert not any(one.mask.any() for one in rounds) and len(rounds) == 2 and not seen


def test_small_pieces_are_dropped():
    mask = ball()
    with_speck = mask.copy()
    with_speck[0, 0, :3] = True
    (found,) = CoarseToFine(margin=2).label_map(image_of(with_speck), centre)[0]
    assert (found.numpy() == mask).all()


def test_six_networks_batches_and_padding():
    """Sizes that no network could take unpadded, two images, three networks a stage."""
    torch.manual_seed(0)
    nets = [UNet(2, 3, 2, channels=(4, 8), norm="instance").eval() for _ in range(6)]
    strategy = CoarseToFine(Slices((0, 1, 2), neighbours=1, divisible=4), margin=2, max_rounds=2)
    x = torch.cat([image_of(ball((9, 7, 10), (4, 3, 5), 2.5)), image_of(ball((9, 7, 10), (5, 3, 3), 3.0))])
    before = x.clone()
    networks = {"coarse": nets[:3], "fine": torch.nn.ModuleList(nets[3:])}
    with torch.inference_mode():
        logits, labels = strategy(x, networks), strategy.label_map(x, networks)
        alone = strategy.label_map(x[1:], networks)
    assert logits.shape == (2, 2, 9, 7, 10) and torch.equal(x, before)
    assert torch.equal(labels.long(), logits.argmax(1, keepdim=True))
    assert torch.equal(labels[1:], alone)


def test_a_meta_tensor_keeps_its_history():
    from monai.data import MetaTensor
    from monai.transforms import Flip

    x = Flip(0)(MetaTensor(image_of(ball())[0]))[None]
    result = CoarseToFine(margin=2).label_map(x, centre)
    assert [record["class"] for record in result.applied_operations] == ["Flip"]


def test_a_2d_image_by_its_rows_and_columns():
    mask = ball()[9]
    labels = CoarseToFine(Slices((0, 1), neighbours=1), margin=2).label_map(image_of(mask), centre)
    assert (labels[0, 0].numpy() == mask).all()


def test_what_is_not_a_number_is_refused():
    with pytest.raises(ValueError, match="not a number"):
        CoarseToFine().label_map(torch.full((1, 1, 3, 3, 3), float("nan")), centre)


def test_progress_is_told_after_each_round():
    told = []
    strategy = CoarseToFine(margin=2, progress=lambda done, total: told.append((done, total)))
    strategy.label_map(image_of(ball()), centre)
    assert told == [(1, 11), (2, 11)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"margin": -1}, "margin must be 0 or more, got -1"),
        ({"max_rounds": -1}, "max_rounds must be 0 or more, got -1"),
        ({"min_share": 1.5}, "min_share must lie in [0, 1], got 1.5"),
        ({"threshold": -0.1}, "threshold must lie in [0, 1], got -0.1"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        CoarseToFine(**arguments)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"coarse": centre}, "networks must be named coarse and fine, got coarse"),
        ({"coarse": [centre] * 2, "fine": centre}, "one network for all axes or one for each of (0, 1, 2), got 2"),
        (lambda s: torch.cat([s, s], 1), "a network must return 1 or 2 channels, or one for each of the 3 slices"),
    ],
)
def test_networks_that_do_not_fit(network, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        CoarseToFine()(image_of(ball()), network)

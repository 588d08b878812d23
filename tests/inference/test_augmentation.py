"""Mirror images: what must not change, what must be swapped, and that a strategy sees one network."""

from __future__ import annotations

from itertools import chain, combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from medseg3d.inference import Slices, SubVolumes
from medseg3d.inference.augmentation import THROUGH, Flips, mirrored_slices, side_pairs
from medseg3d.inference.averaging import Mean


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lopsided(window):
    """A network of four classes that no mirror image leaves alone."""
    weights = noise(4, window.shape[1], *(3,) * (window.dim() - 2), seed=1).to(window.dtype)
    return (F.conv2d if window.dim() == 4 else F.conv3d)(window, weights, padding=1)


def mirrored(x, axes):
    return x.flip([2 + axis for axis in axes]) if axes else x


def all_combinations(axes):
    return list(chain.from_iterable(combinations(axes, count) for count in range(len(axes) + 1)))


def halves(window):
    """Left and right of a thing by where it lies: classes 1 (first half of axis 0) and 2 (second half)."""
    first = torch.zeros_like(window)
    first[:, :, : window.shape[2] // 2] = 1
    thing = (window > 0).float()
    return torch.cat([1 - thing, 2 * thing * first, 2 * thing * (1 - first)], dim=1)


axes_and_shapes = st.integers(2, 3).flatmap(
    lambda dims: st.tuples(
        st.lists(st.integers(0, dims - 1), unique=True, max_size=dims),
        st.tuples(st.integers(1, 3), st.integers(1, 2), *[st.integers(1, 6)] * dims),
    )
)


@settings(max_examples=40, deadline=None)
@given(axes_and_shapes, st.sampled_from(["logits", "probabilities"]), st.booleans())
def test_a_network_that_mirrors_with_its_input_gives_what_it_gave(axes_and_shape, average, batched):
    axes, shape = axes_and_shape
    window = noise(*shape)

    def pointwise(x):
        return torch.cat([x, x.square(), 1 - x], dim=1)

    result = Flips(pointwise, axes, average=average, batched=batched)(window)
    torch.testing.assert_close(result.softmax(1), pointwise(window).softmax(1))
    if average == "logits":
        torch.testing.assert_close(result, pointwise(window))


@settings(max_examples=40, deadline=None)
@given(axes_and_shapes, st.sampled_from(["logits", "probabilities"]), st.booleans())
def test_the_mean_over_mirror_images_by_hand(axes_and_shape, average, batched):
    axes, shape = axes_and_shape
    window = noise(*shape)
    before = window.clone()
    answers = [mirrored(lopsided(mirrored(window, f)), f) for f in all_combinations(axes)]
    result = Flips(lopsided, axes, average=average, batched=batched)(window)
    if average == "logits":
        torch.testing.assert_close(result, torch.stack(answers).mean(0))
    else:
        torch.testing.assert_close(result.softmax(1), torch.stack(answers).softmax(2).mean(0))
        torch.testing.assert_close(result.exp().sum(1), torch.ones(result.exp().sum(1).shape))
    assert torch.equal(window, before)


@pytest.mark.parametrize("average", ["logits", "probabilities"])
@pytest.mark.parametrize("batched", [False, True])
def test_left_and_right_change_places_in_the_mirror(average, batched):
    window = noise(2, 1, 8, 5, 6)
    plain = halves(window)
    swapped = Flips(halves, (0, 2), pairs=[(1, 2)], average=average, batched=batched)(window)
    torch.testing.assert_close(swapped.softmax(1), plain.softmax(1))
    # Without the pair, every voxel of the thing is left as much as right:
    confused = Flips(halves, (0, 2), average=average, batched=batched)(window)
    torch.testing.assert_close(confused[:, 1], confused[:, 2])


def test_only_the_laterality_axis_swaps_sides():
    window = noise(1, 1, 6, 8, 4)

    def halves_of_axis_1(x):
        return halves(x.transpose(2, 3)).transpose(2, 3)

    along_1 = Flips(halves_of_axis_1, (0, 1), pairs=[(1, 2)], laterality_axis=1)(window)
    torch.testing.assert_close(along_1, halves_of_axis_1(window))
    wrong_axis = Flips(halves_of_axis_1, (0, 1), pairs=[(1, 2)], laterality_axis=0)(window)
    assert not torch.allclose(wrong_axis, halves_of_axis_1(window))
    # Mirrored twice, along both axes, is swapped once; not mirrored along it, not at all:
    assert torch.equal(Flips(halves, (1, 2), pairs=[(1, 2)])(window), halves(window))


@pytest.mark.parametrize("average", ["logits", "probabilities"])
def test_in_sub_volumes_it_is_the_mean_of_each_window(average):
    image = noise(1, 1, 11, 9, 10)
    strategy = SubVolumes((6, 6, 8), 0.5, batch_size=3)

    def by_hand(window):
        answers = torch.stack([mirrored(lopsided(mirrored(window, f)), f) for f in all_combinations((0, 2))])
        return answers.mean(0) if average == "logits" else answers.softmax(2).mean(0).log()

    flips = Flips(lopsided, (0, 2), average=average)
    torch.testing.assert_close(strategy(image, flips), strategy(image, by_hand))
    assert torch.equal(strategy.label_map(image, flips), strategy(image, by_hand).argmax(1, keepdim=True))


def test_the_mean_of_whole_images_is_that_of_windows_where_windows_lie_symmetrically():
    """Logits are linear in blending, so mirroring the image is mirroring its windows."""
    image = noise(1, 1, 12, 12, 12)
    strategy = SubVolumes(6, 0.5)
    whole = torch.stack([mirrored(strategy(mirrored(image, f), lopsided), f) for f in all_combinations((0, 1, 2))])
    torch.testing.assert_close(strategy(image, Flips(lopsided, (0, 1, 2))), whole.mean(0))


@pytest.mark.parametrize("average", ["logits", "probabilities"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_type_stays_and_the_mean_is_made_in_float32(average, dtype):
    window = noise(2, 1, 6, 6).to(dtype)
    result = Flips(lopsided, (0, 1), average=average)(window)
    assert result.dtype == dtype and result.device == window.device
    answers = torch.stack([mirrored(lopsided(mirrored(window, f)), f) for f in all_combinations((0, 1))]).double()
    mean = answers.mean(0) if average == "logits" else answers.softmax(2).mean(0).log()
    torch.testing.assert_close(result, mean.to(dtype))


def test_certainty_beyond_float32_leaves_finite_logits():
    mean = Mean("probabilities")
    mean.add(torch.tensor([[[0.0], [-500.0], [500.0]]]))
    result = mean.result()
    assert result.isfinite().all() and result.argmax(1) == 2


def test_what_is_not_a_number_is_not_hidden():
    for average in ("logits", "probabilities"):
        broken = Flips(lambda x: torch.cat([x, x], 1) * float("nan"), (0,), average=average)(noise(1, 1, 3, 3))
        assert broken.isnan().all()


def test_further_arguments_reach_the_network_with_every_mirror_image():
    seen = []
    Flips(lambda x, *args, **kwargs: seen.append((args, kwargs)) or x, (0, 1))(noise(1, 2, 3, 3), 7, scale=2)
    assert seen == [((7,), {"scale": 2})] * 4


def test_a_network_that_writes_into_its_input_does_no_harm():
    window = noise(1, 1, 4, 4)
    before = window.clone()
    result = Flips(lambda x: lopsided(x.mul_(2)), (0, 1))(window)
    assert torch.equal(window, before)
    torch.testing.assert_close(result, Flips(lambda x: lopsided(2 * x), (0, 1))(window))


def test_batched_runs_the_network_once():
    sizes = []
    Flips(lambda x: sizes.append(len(x)) or x, (0, 1, 2), batched=True)(noise(2, 2, 3, 3, 3))
    assert sizes == [16]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"axes": (0, 0)}, r"different spatial axes counted from 0, got axes \(0, 0\)"),
        ({"axes": (-1,)}, r"counted from 0, got axes \(-1,\)"),
        ({"axes": (0,), "pairs": [(1, 2), (2, 3)]}, r"one mirror image .* got pairs \(\(1, 2\), \(2, 3\)\)"),
        ({"axes": (0,), "pairs": [(1, 1)]}, "one mirror image"),
        ({"axes": (0,), "average": "votes"}, "average must be one of logits, probabilities, got 'votes'"),
    ],
)
def test_impossible_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Flips(lopsided, **arguments)


@pytest.mark.parametrize(
    ("arguments", "network", "call", "message"),
    [
        ({"axes": (0, 2)}, lopsided, (), r"axes \(0, 2\) .* the window's 2 spatial axes"),
        ({"axes": (0,), "pairs": [(1, 4)]}, lopsided, (), "does not have: it gives 0 to 3"),
        ({"axes": (0,)}, lambda x: (x, x), (), "the network returns tuple"),
        ({"axes": (0,), "batched": True}, lambda x: {"a": x}, (), "the network returns dict"),
        ({"axes": (0,)}, lambda x: x > 0, (), "the network returns torch.bool"),
        ({"axes": (0,), "average": "probabilities"}, lambda x: x, (), "gives one channel: take average='logits'"),
        ({"axes": (0,), "batched": True}, lopsided, (1,), "take batched=False"),
        ({"axes": (0,)}, lambda x: x[:, :, : 2 + int(x[0, 0, 0, 0] > 0)], (), "logits of one shape have a mean"),
    ],
)
def test_what_does_not_fit_is_told(arguments, network, call, message):
    window = torch.linspace(-1, 1, 16).view(1, 1, 4, 4)
    with pytest.raises(ValueError, match=message):
        Flips(network, **arguments)(window, *call)


# Slices


SIDES = [0, 2, 1, 3]  # classes of `lopsided` with 1 and 2 exchanged


@pytest.mark.parametrize("slice_axis", [0, 1, -1])
@pytest.mark.parametrize("axes", [(0,), (0, 2), (1,)])
@pytest.mark.parametrize("neighbours", [1, 2])
def test_slices_in_the_mirror_are_slices_of_the_mirrored_volume(slice_axis, axes, neighbours):
    image, strategy = noise(1, 2, 6, 5, 7), Slices(slice_axis, neighbours, batch_size=3)
    answers = []
    for mirror in all_combinations(axes):
        answer = mirrored(strategy(mirrored(image, mirror), lopsided), mirror)
        answers.append(answer[:, SIDES] if 0 in mirror else answer)
    network = mirrored_slices(lopsided, strategy, axes, laterality_axis=0, pairs=[(1, 2)])
    torch.testing.assert_close(strategy(image, network), torch.stack(answers).mean(0))


@pytest.mark.parametrize("neighbours", [0, 1])
def test_each_axis_of_slices_has_its_own_mirror(neighbours):
    """Without neighbours the slices along the mirrored axis are the same: those of the others are mirrored alone."""
    image = noise(1, 1, 6, 5, 7)
    networks = [lambda x, n=n: (n + 1) * lopsided(x) for n in range(3)]
    together = Slices((0, 1, 2), neighbours)
    network = mirrored_slices(networks, together, (0,), pairs=[(1, 2)])
    shares = torch.zeros(1, 4, 6, 5, 7)
    for axis, own in enumerate(networks):
        one = Slices(axis, neighbours)
        answer = one(image, own)
        if axis > 0 or neighbours:
            answer = (answer + one(image.flip(2), own).flip(2)[:, SIDES]) / 2
        shares += answer.softmax(1) / 3
    torch.testing.assert_close(together(image, network).softmax(1), shares)


def test_slices_that_have_no_mirror_image():
    with pytest.raises(ValueError, match="slices along axis 2 are the same in a mirror along it: take neighbours"):
        mirrored_slices(lopsided, Slices(-1), (2,))
    with pytest.raises(ValueError, match=r"axes are different spatial axes counted from 0, got axes \(-1,\)"):
        Flips(lopsided, (THROUGH,))


def test_pairs_by_name():
    names = {
        1: "kidney_left",
        2: "kidney_right",
        3: "Left Parotid",
        4: "right parotid",
        5: "optic nerve L",
        6: "optic nerve (R)",
        7: "lung_middle_lobe_right",
        8: "vertebrae_L1",
        9: "liver",
        11: "lung_upper_lobe_right",
        10: "lung_upper_lobe_left",
    }
    assert set(side_pairs(names)) == {(1, 2), (3, 4), (5, 6), (10, 11)}


def test_two_labels_of_one_side_are_refused():
    with pytest.raises(ValueError, match=r"labels 1 and 3 are both the left side of 'L kidney'"):
        side_pairs({1: "left kidney", 2: "right kidney", 3: "L kidney"})

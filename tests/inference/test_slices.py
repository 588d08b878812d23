"""Segmentation slice by slice: what holds for every network, axis and size."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from medseg3d.inference import Slices
from medseg3d.inference.downsampled import resample
from medseg3d.inference.grid_map import edge_to_edge
from medseg3d.inference.onto_grid import labels_onto
from medseg3d.networks.unet import UNet

FUSIONS = ["mean", "majority"]


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def identity(slices):
    return slices


def blur(slices):
    """A network that looks around itself, the same in both directions."""
    return F.avg_pool2d(slices, 3, 1, 1)


def times(factor):
    return lambda slices: factor * slices


@settings(max_examples=30, deadline=None)
@given(
    size=st.tuples(*[st.integers(1, 11)] * 3),
    roi=st.tuples(*[st.sampled_from([None, 0, 4, 8])] * 2),
    axis=st.integers(-3, 2),
    divisible=st.sampled_from([1, 2, 4]),
    batch_size=st.integers(1, 4),
)
def test_what_a_network_leaves_alone_stays_as_it_is(size, roi, axis, divisible, batch_size):
    x = noise(2, 3, *size)
    strategy = Slices(axis, roi_size=roi, divisible=divisible, batch_size=batch_size)
    torch.testing.assert_close(strategy(x, identity), x, rtol=0, atol=1e-5)


def test_a_slice_that_is_taken_whole_is_given_to_the_network_unchanged_and_back():
    x = noise(1, 2, 5, 7, 6)
    assert torch.equal(Slices(1, divisible=4)(x, identity), x)


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("shape", [(7, 5, 6), (8, 3)])
def test_constant_in_constant_out(fusion, shape):
    strategy = Slices(range(len(shape)), roi_size=4, fusion=fusion, batch_size=3)
    result = strategy(torch.full((2, 1, *shape), 3.0), lambda s: torch.cat([s, 2 * s, -s], dim=1))
    expected = torch.tensor([3.0, 6.0, -3.0]).softmax(0) if fusion == "mean" else torch.tensor([0.0, 1.0, 0.0])
    expected = expected.view(3, *[1] * len(shape)).expand(2, 3, *shape)
    torch.testing.assert_close(result.softmax(1), expected)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_each_slice_is_seen_by_itself(axis):
    """Nothing passes from a slice to the next: only the slice that is not 0 becomes something else."""
    x = torch.zeros(1, 1, 6, 6, 6)
    x.select(2 + axis, 4)[0, 0, 2, 3] = 9.0
    result = Slices(axis)(x, blur)
    assert result.select(2 + axis, 4).sum() == 9.0 and result.sum() == 9.0
    assert (result > 0).sum() == 9


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_neighbours_are_channels_and_ends_are_repeated(axis):
    x = torch.arange(4.0).view([4 if a == axis else 1 for a in range(3)]).expand(4, 4, 4)
    x = torch.stack([x, 10 + x])[None]
    result = Slices(axis, neighbours=2, batch_size=3)(x, identity).movedim(2 + axis, 2)[0, :, :, 0, 0]
    stack = torch.tensor([[0, 0, 0, 1], [0, 0, 1, 2], [0, 1, 2, 3], [1, 2, 3, 3], [2, 3, 3, 3]]).float()
    assert torch.equal(result, torch.stack([stack, 10 + stack], dim=1).flatten(0, 1))


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("order", [(1, 0, 2), (2, 0, 1), (0, 2, 1)])
def test_a_transposed_volume_gives_the_transposed_result(fusion, order):
    x = noise(1, 3, 6, 5, 7)
    moved = x.permute(0, 1, *(2 + a for a in order))
    networks = {0: times(1), 1: blur, 2: times(-2)}
    expected = Slices((0, 1, 2), fusion=fusion)(x, networks).permute(0, 1, *(2 + a for a in order))
    own = {n: networks[a] for n, a in enumerate(order)}
    torch.testing.assert_close(Slices((2, 0, 1), fusion=fusion)(moved, own), expected)
    for n, axis in enumerate(order):
        expected = Slices(axis)(x, blur).permute(0, 1, *(2 + a for a in order))
        torch.testing.assert_close(Slices(n)(moved, blur), expected)


def test_mean_is_the_logarithm_of_the_mean_probability():
    x = noise(2, 4, 5, 6, 7)
    result = Slices((0, 1, 2))(x, [times(1), times(2), times(-1)])
    mean = (x.softmax(1) + (2 * x).softmax(1) + (-x).softmax(1)) / 3
    torch.testing.assert_close(result, mean.log())


def test_sums_in_bfloat16_are_close():
    x = noise(1, 4, 5, 6, 7)
    exact = Slices((0, 1, 2))(x, blur).softmax(1)
    half = Slices((0, 1, 2), accumulate=torch.bfloat16)(x, blur).softmax(1)
    assert not torch.equal(half, exact)
    torch.testing.assert_close(half, exact, rtol=2 * 3 * 2**-9, atol=0)


def test_majority_goes_to_the_class_of_most_axes_and_ties_to_the_lower():
    x = noise(1, 5, 6, 6, 6)
    networks = [identity, times(-1), lambda slices: slices.roll(2, 1)]
    votes = [network(x).argmax(1) for network in networks]
    first, second, third = (vote.flatten().tolist() for vote in votes)
    expected = [max(sorted(three), key=three.count) for three in zip(first, second, third, strict=True)]
    strategy = Slices((0, 1, 2), fusion="majority")
    assert strategy.label_map(x, networks).flatten().tolist() == expected
    assert len({len({*three}) for three in zip(first, second, third, strict=True)}) > 1  # there were ties
    shares = strategy(x, networks).softmax(1)
    torch.testing.assert_close(shares, sum(F.one_hot(v, 5).movedim(-1, 1) for v in votes) / 3)


@pytest.mark.parametrize("axes", [0, 1, -1, (2, 0), (0, 1, 2)])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_label_map_is_the_argmax_of_the_logits(axes, fusion):
    x, strategy = noise(2, 5, 12, 9, 10), Slices(axes, roi_size=8, fusion=fusion, batch_size=4)
    labels = strategy.label_map(x, blur)
    assert labels.shape == (2, 1, 12, 9, 10) and labels.dtype == torch.uint8
    assert torch.equal(labels.long(), strategy(x, blur).argmax(dim=1, keepdim=True))
    assert (strategy.label_map(torch.ones_like(x), identity) == 0).all()  # ties go to the lower class


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("batch_size", [2, 5, 1000])
def test_neither_the_batch_size_nor_the_other_images_matter(batch_size, fusion):
    x = noise(3, 2, 7, 10, 6)
    weights = noise(4, 2, 3, 3, seed=1)

    def network(slices):
        return F.conv2d(slices, weights, padding=1)

    expected = torch.cat([Slices((0, 1, 2), roi_size=5, fusion=fusion)(one[None], network) for one in x])
    result = Slices((0, 1, 2), roi_size=5, fusion=fusion, batch_size=batch_size)(x, network)
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("axes", [1, (0, 1, 2)])
def test_nothing_that_is_given_is_changed(axes):
    x, returned = noise(1, 2, 5, 6, 7), []
    before = x.clone()

    def network(slices):
        returned.append((slices[:, :], slices.clone()))
        return returned[-1][0]

    Slices(axes)(x, network)
    Slices(axes).label_map(x, network)
    assert torch.equal(x, before)
    assert all(torch.equal(given, copy) for given, copy in returned)


@pytest.mark.parametrize("axes", [2, (0, 1, 2)])
def test_networks_see_sizes_they_can_take(axes):
    network = UNet(spatial_dims=2, in_channels=3, out_channels=4, channels=(4, 8, 8), norm="instance").eval()
    strategy = Slices(axes, neighbours=1, divisible=4, batch_size=2)
    x = noise(1, 1, 9, 10, 7)
    with torch.inference_mode():
        logits, labels = strategy(x, network), strategy.label_map(x, network)
        padded = F.pad(x.movedim(-1, 2)[0, 0], (1, 1, 1, 2))  # 10 -> 12 and 9 -> 12
        one = network(padded[[2, 3, 4]][None])[0, :, 1:10, 1:11]
    assert logits.shape == (1, 4, 9, 10, 7)
    assert torch.equal(labels.long(), logits.argmax(1, keepdim=True))
    if axes == 2:
        torch.testing.assert_close(logits[0, ..., 3], one, rtol=1e-4, atol=1e-5)


def test_as_inferers_of_a_bundle():
    """By their names in a config, with an evaluator's way of calling them and a network that has gradients."""
    from monai.bundle import ConfigParser

    config = {
        "slices": {"_target_": "medseg3d.inference.Slices", "axes": [0, 1, 2], "accumulate": "$torch.bfloat16"},
        "coarse_to_fine": {"_target_": "medseg3d.inference.CoarseToFine", "slices": "@slices", "margin": 1},
        "one_axis": {"_target_": "medseg3d.inference.Slices", "axes": 2, "batch_size": 2},
        "downsampled": {"_target_": "medseg3d.inference.Downsampled", "size": [6, 5]},
    }
    parser = ConfigParser({"imports": ["$import torch"], **config})
    networks = torch.nn.ModuleList(torch.nn.Conv2d(1, 2, 3, padding=1) for _ in range(3))
    x = noise(2, 1, 8, 6, 7)
    for name, image, network in [
        ("slices", x, networks),
        ("coarse_to_fine", x, networks),
        ("one_axis", x, networks[0]),
        ("downsampled", x[..., 0], networks[0]),
    ]:
        inferer = parser.get_parsed_content(name)
        logits = inferer(inputs=image, network=network)
        assert logits.shape == (2, 2, *image.shape[2:])
        assert torch.equal(inferer.label_map(image, network).long(), logits.argmax(1, keepdim=True))


@pytest.mark.parametrize("axes", [0, 1, 2, (2, 1, 0)])
def test_slabs_can_be_brought_onto_another_grid(axes):
    x, target, strategy = noise(1, 3, 7, 6, 9), (10, 4, 13), Slices(axes)
    labels = labels_onto(strategy.slabs(x, blur), edge_to_edge(x.shape[2:], target))
    expected = resample(strategy(x, blur)[0], target).argmax(0)
    assert np.array_equal(labels, expected.numpy())


def test_the_padding_value_reaches_the_network():
    seen = []
    Slices(0, divisible=4, padding_value=-5.0)(torch.zeros(1, 1, 1, 2, 3), lambda s: seen.append(s.clone()) or s)
    (one,) = seen
    assert one.shape == (1, 1, 4, 4) and (one == 0).sum() == 6 and (one == -5).sum() == 10


@pytest.mark.parametrize("kind", ["list", "mapping", "module list", "module dict"])
def test_one_network_an_axis(kind):
    convs = [torch.nn.Conv2d(1, 2, 1) for _ in range(3)]
    x = noise(1, 1, 3, 4, 5)
    networks = {
        "list": convs,
        "mapping": dict(enumerate(convs)),
        "module list": torch.nn.ModuleList(convs),
        "module dict": torch.nn.ModuleDict({str(n): conv for n, conv in enumerate(convs)}),
    }[kind]
    with torch.inference_mode():
        result = Slices((0, 1, 2))(x, networks)
        expected = sum(conv(x[0].movedim(0, 1)).movedim(1, 0)[None].softmax(1) for conv in convs) / 3
    torch.testing.assert_close(result.softmax(1), expected)


def test_a_meta_tensor_keeps_its_place_and_its_history():
    from monai.data import MetaTensor
    from monai.transforms import Flip

    affine = torch.diag(torch.tensor([2.0, 1.5, 3.0, 1.0], dtype=torch.float64))
    x = Flip(0)(MetaTensor(noise(2, 5, 4, 3), affine=affine))[None]
    kinds = set()

    def network(slices):
        kinds.add(type(slices))
        return slices

    for result in (Slices(2)(x, network), Slices((0, 1, 2)).label_map(x, network)):
        assert isinstance(result, MetaTensor) and result.shape[2:] == (5, 4, 3)
        torch.testing.assert_close(result.affine, x.affine)
        assert [record["class"] for record in result.applied_operations] == ["Flip"]
    assert kinds == {torch.Tensor}


def test_progress_is_told_after_each_batch():
    told = []
    strategy = Slices((0, 2), batch_size=3, progress=lambda done, total: told.append((done, total)))
    strategy(noise(1, 2, 4, 2, 3), identity)
    assert told == [(3, 7), (4, 7), (7, 7)]


def test_further_arguments_reach_the_network():
    result = Slices(0)(torch.ones(1, 1, 3, 3, 3), lambda s, a, b=0: a * s + b, 2.0, b=3.0)
    assert torch.equal(result, torch.full_like(result, 5.0))


def test_labels_of_what_is_not_a_number_are_refused():
    for strategy in (Slices(0), Slices((0, 1, 2)), Slices((0, 1, 2), fusion="majority")):
        with pytest.raises(ValueError, match="not a number"):
            strategy.label_map(torch.full((1, 2, 3, 3, 3), float("nan")), identity)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"axes": ()}, "axes must name one spatial axis or more"),
        ({"neighbours": -1}, "neighbours must be 0 or more, got -1"),
        ({"divisible": 0}, "divisible must be 1 or more, got 0"),
        ({"fusion": "max"}, "fusion must be one of mean, majority, got 'max'"),
        ({"roi_size": (8, 6), "divisible": 4}, "roi_size must be made of multiples of divisible=4, got (8, 6)"),
        ({"overlap": 1.0}, "overlap must lie in [0, 1), got 1.0"),
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"padding_mode": "wrap"}, "padding_mode must be one of"),
        ({"accumulate": torch.float16}, "accumulate must be torch.float32 or torch.bfloat16"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Slices(**arguments)


@pytest.mark.parametrize(
    ("arguments", "network", "message"),
    [
        ({"axes": 3}, identity, "axes must be different ones of the image's 3 spatial axes, got (3,)"),
        ({"axes": (0, -3)}, identity, "axes must be different ones of the image's 3 spatial axes, got (0, -3)"),
        ({"roi_size": (4, 4, 4)}, identity, "roi_size (4, 4, 4) is for 3 axes, but a slice has 2: (6, 6)"),
        ({"axes": (0, 1)}, [identity] * 3, "one network for all axes or one for each of (0, 1), got 3"),
        ({"axes": (0, 1)}, {0: identity}, "a network for each of the axes [0, 1], got them for ['0']"),
        ({}, None, "a network must be callable"),
        ({}, lambda s: (s, s), "the network returns a tuple"),
        ({}, lambda s: F.avg_pool2d(s, 2), "logits at the image's resolution"),
        ({"axes": (0, 1)}, lambda s: s[:, :1], "two classes or more, but the network has only 1"),
        (
            {"axes": (0, 1), "fusion": "majority"},
            lambda s: s[:, :1],
            "two classes or more, but the network has only 1",
        ),
        ({"axes": (0, 1)}, [identity, lambda s: s[:, :2]], "the same classes, got 3 and 2"),
        ({"axes": (0, 1), "fusion": "majority"}, [identity, lambda s: s[:, :2]], "the same classes, got 3 and 2"),
    ],
)
def test_what_does_not_fit_the_image(arguments, network, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Slices(**arguments)(torch.zeros(1, 3, 6, 6, 6), network)


def test_batches_that_are_none():
    with pytest.raises(ValueError, match=re.escape("one image or more, got a batch of shape (0, 1, 4, 4, 4)")):
        Slices()(torch.zeros(0, 1, 4, 4, 4), identity)
    with pytest.raises(ValueError, match="slabs are of one image at a time, got 2"):
        list(Slices().slabs(torch.zeros(2, 1, 4, 4, 4), identity))
    with pytest.raises(ValueError, match=re.escape("with 2 spatial axes or more, got (1, 1, 4)")):
        Slices()(torch.zeros(1, 1, 4), identity)

"""Segmentation of the whole image made small: what holds for every network and size."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from medseg3d import interpolation
from medseg3d.inference import Downsampled
from medseg3d.inference.downsampled import factored, resample
from medseg3d.networks.unet import UNet

SIZE = (8, 6, 4)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def identity(image):
    return image


def network_with_head(features=3, classes=7, spatial_dims=3):
    conv = {2: nn.Conv2d, 3: nn.Conv3d}[spatial_dims]
    torch.manual_seed(0)
    return nn.Sequential(conv(1, features, 3, padding=1), nn.ReLU(), conv(features, classes, 1)).eval()


@pytest.mark.parametrize("size", [(8, 6, 4), (5, 9, 17), (1, 1, 1)])
def test_images_are_resampled_as_by_the_preprocessing(size):
    x = noise(2, 11, 6, 10)
    expected = interpolation.interpolate(x.numpy(), size)
    np.testing.assert_allclose(resample(x, size).numpy(), expected, rtol=0, atol=1e-5)


def test_nothing_aliases():
    """Every second slice bright: what is made smaller threefold shows their mean, not single slices."""
    x = torch.zeros(1, 1, 24, 24, 24)
    x[:, :, ::2] = 1.0
    seen = []
    Downsampled((8, 8, 8))(x, lambda image: seen.append(image.clone()) or image)
    assert (seen[0][:, :, 1:-1] - 0.5).abs().max() < 0.06


def test_the_network_runs_once_an_image_on_the_size_it_was_made_for():
    seen = []
    Downsampled(SIZE)(noise(3, 2, 13, 4, 9), lambda image: seen.append(tuple(image.shape)) or image)
    assert seen == [(1, 2, *SIZE)] * 3
    network = network_with_head()
    network.register_forward_hook(lambda *_: seen.append("ran"))
    Downsampled(SIZE)(noise(1, 1, 13, 4, 9), network)
    assert seen[3:] == ["ran"]


@pytest.mark.parametrize("shape", [(20, 13, 9), (3, 2, 1), (8, 6, 4), (17, 6, 2)])
def test_constant_in_constant_out(shape):
    result = Downsampled(SIZE)(torch.full((2, 1, *shape), 3.0), lambda image: torch.cat([image, 2 * image], dim=1))
    torch.testing.assert_close(result[:, 0], torch.full((2, *shape), 3.0))
    torch.testing.assert_close(result[:, 1], torch.full((2, *shape), 6.0))


def test_an_image_of_that_size_is_left_as_it_is():
    x = noise(1, 2, *SIZE)
    assert torch.equal(Downsampled(SIZE)(x, identity), x)


@pytest.mark.parametrize("shape", [(20, 13, 9), (9, 20, 5), (8, 6, 30), (8, 7, 4), (16, 12), (30, 7)])
def test_logits_come_back_by_linear_interpolation(shape):
    small = noise(1, 3, *SIZE[: len(shape)], seed=1)
    result = Downsampled(SIZE[: len(shape)])(noise(1, 1, *shape), lambda image: small)
    mode = "trilinear" if len(shape) == 3 else "bilinear"
    torch.testing.assert_close(result, F.interpolate(small, shape, mode=mode), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 3, 2), (4, 30, 4), (1, 1, 1), (3, 5)])
def test_where_the_image_is_smaller_logits_come_back_without_aliasing(shape):
    small = noise(1, 3, *SIZE[: len(shape)], seed=1)
    result = Downsampled(SIZE[: len(shape)])(noise(1, 1, *shape), lambda image: small)
    expected = small[0].double().numpy()
    for axis, size in enumerate(shape, start=1):
        weights = interpolation.axis_weights(expected.shape[axis], size)
        expected = np.moveaxis(np.tensordot(weights, expected, (1, axis)), 0, axis)
    np.testing.assert_allclose(result[0].numpy(), expected, rtol=1e-5, atol=1e-5)


def test_a_transposed_volume_gives_the_transposed_result():
    x, order = noise(1, 2, 20, 13, 9), (2, 0, 1)
    moved = x.permute(0, 1, *(2 + a for a in order))
    expected = Downsampled(SIZE)(x, identity).permute(0, 1, *(2 + a for a in order))
    result = Downsampled([SIZE[a] for a in order])(moved, identity)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_last_layer_of_kernel_1_comes_after_the_interpolation(spatial_dims):
    network = network_with_head(spatial_dims=spatial_dims)
    shape, size = (20, 13, 9)[:spatial_dims], SIZE[:spatial_dims]
    x = noise(1, 1, *shape)
    strategy = Downsampled(size)
    with torch.inference_mode():
        slabs = list(strategy.slabs(x, network))
        whole = Downsampled(size)(x, lambda image: network(image))  # a function hides its layers
        assert {(len(slab.values), slab.classes) for slab in slabs} == {(3, 7)}
        torch.testing.assert_close(strategy(x, network), whole, rtol=1e-4, atol=1e-5)
        assert torch.equal(strategy.label_map(x, network), Downsampled(size).label_map(x, lambda image: network(image)))


@pytest.mark.parametrize("last", [nn.Tanh(), nn.Conv3d(7, 7, 3, padding=1), nn.Softmax(1)])
def test_a_last_layer_that_is_followed_by_another_stays(last):
    network = nn.Sequential(*network_with_head(), last)
    x = noise(1, 1, *SIZE)
    with torch.inference_mode():
        logits = network(x)[0]
        values, head = factored(logits, network)
    assert head is None and values is logits


def test_a_real_network():
    network = UNet(spatial_dims=3, in_channels=1, out_channels=6, channels=(4, 8), norm="instance").eval()
    x = noise(2, 1, 11, 20, 9)
    strategy = Downsampled((8, 8, 4))
    with torch.inference_mode():
        logits, labels = strategy(x, network), strategy.label_map(x, network)
        assert next(strategy.slabs(x[:1], network)).head is not None
    small = network(resample(x[0], (8, 8, 4))[None])
    expected = F.interpolate(small, x.shape[2:], mode="trilinear")
    torch.testing.assert_close(logits[:1], expected.detach(), rtol=1e-4, atol=1e-4)
    assert torch.equal(labels.long(), logits.argmax(1, keepdim=True))


@pytest.mark.parametrize("shape", [(12, 9, 10), (5, 9, 3), (3, 3, 3), (19, 11)])
def test_label_map_is_the_argmax_of_the_logits(shape):
    x, strategy = noise(3, 5, *shape), Downsampled(SIZE[: len(shape)])
    labels = strategy.label_map(x, identity)
    assert labels.shape == (3, 1, *shape) and labels.dtype == torch.uint8
    assert torch.equal(labels.long(), strategy(x, identity).argmax(dim=1, keepdim=True))
    assert (strategy.label_map(torch.ones_like(x), identity) == 0).all()  # ties go to the lower class


def test_more_than_256_classes():
    labels = Downsampled((4, 4)).label_map(noise(1, 300, 9, 9), identity)
    assert labels.dtype == torch.int32 and labels.max() > 255


def test_the_other_images_of_a_batch_do_not_matter():
    x, strategy = noise(3, 1, 12, 9, 10), Downsampled(SIZE)
    expected = torch.cat([strategy(one[None], identity) for one in x])
    assert torch.equal(strategy(x, identity), expected)


@pytest.mark.parametrize("shape", [(12, 9, 10), SIZE])
def test_nothing_that_is_given_is_changed(shape):
    x, returned = noise(1, 2, *shape), []
    before = x.clone()

    def network(image):
        returned.append((image[:, :], image.clone()))
        return returned[-1][0]

    Downsampled(SIZE)(x, network)
    Downsampled(SIZE).label_map(x, network)
    Downsampled(SIZE)(x, lambda image: image.mul_(2))
    assert torch.equal(x, before)
    assert all(torch.equal(given, copy) for given, copy in returned)


@pytest.mark.parametrize(
    ("given", "seen"), [(torch.uint8, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)]
)
def test_the_type_that_the_network_sees(given, seen):
    types = []
    x = (noise(1, 1, 12, 9, 10).abs() * 50).to(given)
    assert Downsampled(SIZE)(x, lambda image: types.append(image.dtype) or image).dtype == torch.float32
    assert types == [seen]


def test_a_meta_tensor_keeps_its_place_and_its_history():
    from monai.data import MetaTensor
    from monai.transforms import Flip

    affine = torch.diag(torch.tensor([2.0, 1.5, 3.0, 1.0], dtype=torch.float64))
    x = Flip(0)(MetaTensor(noise(2, 9, 8, 7), affine=affine))[None]
    kinds = set()
    result = Downsampled(SIZE)(x, lambda image: kinds.add(type(image)) or image)
    assert isinstance(result, MetaTensor) and result.shape == x.shape
    torch.testing.assert_close(result.affine, x.affine)
    assert [record["class"] for record in result.applied_operations] == ["Flip"]
    assert kinds == {torch.Tensor}


def test_progress_is_told_after_each_slice():
    told = []
    strategy = Downsampled((4, 4), progress=lambda done, total: told.append((done, total)))
    strategy(noise(1, 1, 3, 7), identity)
    assert told == [(n, 7) for n in range(1, 8)]
    strategy.label_map(noise(2, 2, 3, 7), identity)
    assert told[7:] == [(1, 2), (2, 2)]


def test_further_arguments_reach_the_network():
    result = Downsampled(SIZE)(torch.ones(1, 1, 3, 3, 3), lambda x, a, b=0: a * x + b, 2.0, b=3.0)
    torch.testing.assert_close(result, torch.full_like(result, 5.0))


@pytest.mark.parametrize("size", [(8,), (8, 8, 8, 8), (8, 0, 8)])
def test_sizes_that_cannot_be(size):
    with pytest.raises(ValueError, match="size must be two or three numbers of voxels, 1 or more each"):
        Downsampled(size)


@pytest.mark.parametrize(
    ("shape", "network", "message"),
    [
        ((1, 1, 9, 9), identity, "size (8, 6, 4) is for 3 spatial axes, but the image has 2: (9, 9)"),
        ((1, 1, 9), identity, "with 2 spatial axes or more, got (1, 1, 9)"),
        ((0, 1, 9, 9, 9), identity, "one image or more"),
        ((1, 1, 9, 9, 9), lambda x: (x, x), "the network returns a tuple"),
        ((1, 1, 9, 9, 9), lambda x: F.avg_pool3d(x, 2), "logits of the size (8, 6, 4), got (4, 3, 2)"),
    ],
)
def test_what_does_not_fit(shape, network, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Downsampled(SIZE)(torch.zeros(shape), network)
    with pytest.raises(ValueError, match=re.escape(message)):
        Downsampled(SIZE).label_map(torch.zeros(shape), network)


def test_labels_of_what_is_not_a_number_are_refused():
    with pytest.raises(ValueError, match="not a number"):
        Downsampled(SIZE).label_map(torch.full((1, 2, 9, 9, 9), float("nan")), identity)


@pytest.mark.parametrize("size", [(13, 5, 9), (4, 3, 2), SIZE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_classes_that_are_ruled_out_stay_so(size, dtype):
    """-inf in one class everywhere, in another in half of the image; the lowest number counts as much."""
    for lowest in (float("-inf"), torch.finfo(dtype).min):
        logits = noise(1, 4, *SIZE).to(dtype)
        logits[:, 0] = lowest
        logits[:, 1, :4] = lowest
        given = logits.clone()
        image, strategy = torch.zeros(1, 1, *size), Downsampled(SIZE)
        found = strategy(image, lambda _, logits=logits: logits)
        labels = strategy.label_map(image, lambda _, logits=logits: logits)
        assert torch.equal(logits, given)
        assert found.isfinite().all() and (found[:, 0] < -9000).all()
        expected = strategy(image, lambda _, logits=logits: logits.clamp_min(-1e4))
        torch.testing.assert_close(found, expected)
        assert torch.equal(labels, expected.argmax(1, keepdim=True))


def test_a_logit_that_is_not_a_number_is_refused_beside_infinities():
    logits = torch.full((1, 2, *SIZE), float("-inf"))
    logits[:, 0] = float("nan")
    with pytest.raises(ValueError, match="not a number"):
        Downsampled(SIZE).label_map(torch.zeros(1, 1, 9, 9, 9), lambda _: logits)

"""Properties of sub-volume inference that hold for every size, overlap and network."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.inferers import sliding_window_inference
from torch.nn import functional as F

from medseg3d.inference import SubVolumes
from medseg3d.inference.windows import importance_map, window_starts, windows

BLENDS = ["gaussian", "constant"]


def identity(window):
    return window


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(
    axes=st.lists(st.tuples(st.integers(1, 10), st.integers(1, 10)), min_size=1, max_size=3),
    overlap=st.sampled_from([0.0, 0.25, 0.5, 0.8, 0.99]),
)
def test_windows_lie_inside_and_cover_every_voxel(axes, overlap):
    image_size = [max(size, roi) for size, roi in axes]  # smaller images are padded first
    roi_size = [roi for _, roi in axes]
    seen = torch.zeros(image_size)
    corners = set()
    for window in windows(image_size, roi_size, [overlap] * len(axes)):
        assert [part.stop - part.start for part in window] == roi_size
        assert all(part.start >= 0 and part.stop <= size for part, size in zip(window, image_size, strict=True))
        corners.add(tuple(part.start for part in window))
        seen[window] += 1
    assert seen.min() >= 1
    assert seen.sum() == len(corners) * torch.tensor(roi_size).prod()  # no window twice


@settings(max_examples=30, deadline=None)
@given(
    size=st.tuples(*[st.integers(1, 12)] * 3),
    roi=st.tuples(*[st.integers(2, 8)] * 3),
    overlap=st.sampled_from([0.0, 0.3, 0.5, 0.75]),
    blend=st.sampled_from(BLENDS),
)
def test_what_a_network_leaves_alone_stays_as_it_is(size, roi, overlap, blend):
    """Whatever the size, also below the window's: blending identities gives the image, at every voxel."""
    x = noise(1, 2, *size)
    torch.testing.assert_close(SubVolumes(roi, overlap, blend)(x, identity), x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(19, 16, 17), (23, 8, 5), (7, 21, 6), (16, 18, 27)])
@pytest.mark.parametrize("scale", [2, 4])
def test_an_output_of_lower_resolution_is_that_of_monai(size, scale):
    """For odd sizes too, of images larger and smaller than a window."""

    def network(window):
        return window.clone(), F.avg_pool3d(window, scale)

    x = noise(1, 1, *size)
    expected = sliding_window_inference(x, (8, 8, 8), 1, network, overlap=0.5, mode="gaussian")
    for own, other in zip(SubVolumes((8, 8, 8), 0.5)(x, network), expected, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize("shape", [(17, 11, 9), (23, 8)])
def test_constant_in_constant_out(blend, shape):
    strategy = SubVolumes(6, 0.5, blend, batch_size=3)
    result = strategy(torch.full((2, 1, *shape), 3.0), lambda w: torch.cat([w, 2 * w], dim=1))
    torch.testing.assert_close(result[:, 0], torch.full((2, *shape), 3.0), rtol=1e-6, atol=0)
    torch.testing.assert_close(result[:, 1], torch.full((2, *shape), 6.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [(9, 9, 9), (8, 8, 8), (3, 8, 5)])
def test_a_network_that_returns_its_input_does_not_damage_the_image(size):
    x = noise(1, 1, *size)
    before = x.clone()
    strategy = SubVolumes(8, 0.5)
    strategy(x, identity)
    strategy(x, lambda window: window[:, :1])
    assert torch.equal(x, before)


def test_what_the_network_returns_is_not_changed():
    returned = []

    def network(window):
        returned.append((torch.ones_like(window), window * 0 + 1))
        return returned[-1]

    SubVolumes(4, 0.5)(noise(1, 1, 9, 9, 9), network)
    assert all((out == 1).all() for outputs in returned for out in outputs)


@pytest.mark.parametrize("batch_size", [2, 5, 1000])
def test_the_batch_size_does_not_matter(batch_size):
    x = noise(3, 2, 15, 10, 12)
    weights = noise(4, 2, 3, 3, 3, seed=1)

    def network(window):
        return torch.nn.functional.conv3d(window, weights, padding=1)

    expected = SubVolumes((8, 6, 7), 0.4, batch_size=1)(x, network)
    torch.testing.assert_close(SubVolumes((8, 6, 7), 0.4, batch_size=batch_size)(x, network), expected)


@pytest.mark.parametrize("mode", ["constant", "replicate", "reflect", "circular"])
def test_a_smaller_image_is_padded_on_both_sides_and_cropped_back(mode):
    sizes = []

    def network(window):
        sizes.append(tuple(window.shape))
        return window

    x = noise(1, 1, 6, 5, 20)
    result = SubVolumes((8, 8, 8), 0.5, padding_mode=mode, padding_value=7.0)(x, network)
    assert set(sizes) == {(1, 1, 8, 8, 8)}
    torch.testing.assert_close(result, x, rtol=0, atol=1e-5)


def test_a_small_image_is_mirrored_as_often_as_it_takes():
    windows_seen = []
    x = noise(1, 1, 3, 5, 1)
    SubVolumes(16, padding_mode="reflect")(x, lambda window: windows_seen.append(window.clone()) or window)
    expected = np.pad(x[0, 0].numpy(), ((6, 7), (5, 6), (7, 8)), mode="reflect")
    np.testing.assert_array_equal(windows_seen[0][0, 0].numpy(), expected)


def test_the_padding_value_reaches_the_network():
    x = torch.zeros(1, 1, 2, 2, 2)
    windows_seen = []
    SubVolumes(4, padding_value=-5.0)(x, lambda window: windows_seen.append(window.clone()) or window)
    (window,) = windows_seen
    assert (window == 0).sum() == 8 and (window == -5).sum() == 56
    assert (window[0, 0, 1:3, 1:3, 1:3] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.uint8])
def test_sums_are_kept_in_float32(dtype):
    """Up to 125 windows overlap here: sums of the input's own type would be wrong in the second or third digit."""
    x = (noise(1, 1, 9, 8, 7).abs() * 50).to(dtype)
    result = SubVolumes(5, 0.8)(x, identity)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, x.float(), rtol=1e-5, atol=1e-5)


def test_a_meta_tensor_keeps_its_place_and_its_history():
    from monai.data import MetaTensor
    from monai.transforms import Flip

    affine = torch.diag(torch.tensor([2.0, 1.5, 3.0, 1.0], dtype=torch.float64))
    x = Flip(0)(MetaTensor(noise(1, 9, 8, 7), affine=affine))[None]
    result = SubVolumes(6)(x, lambda window: torch.cat([window, window], dim=1))
    assert isinstance(result, MetaTensor) and result.shape == (1, 2, 9, 8, 7)
    torch.testing.assert_close(result.affine, x.affine)
    assert [record["class"] for record in result.applied_operations] == ["Flip"]


def test_the_network_never_sees_a_meta_tensor():
    from monai.data import MetaTensor

    kinds = set()
    SubVolumes(6)(MetaTensor(noise(1, 1, 9, 8, 7)), lambda window: kinds.add(type(window)) or window)
    assert kinds == {torch.Tensor}


def test_label_map_is_the_argmax_of_the_logits():
    x, strategy = noise(2, 5, 12, 9, 10), SubVolumes(6, 0.5)
    labels = strategy.label_map(x, identity)
    assert labels.shape == (2, 1, 12, 9, 10) and labels.dtype == torch.uint8
    assert torch.equal(labels.long(), strategy(x, identity).argmax(dim=1, keepdim=True))
    assert (strategy.label_map(torch.ones_like(x), identity) == 0).all()  # ties go to the lower class


@settings(max_examples=40, deadline=None)
@given(
    size=st.lists(st.integers(1, 14), min_size=2, max_size=3),
    roi=st.integers(2, 7),
    overlap=st.sampled_from([0.0, 0.3, 0.5, 0.85]),
    placement=st.sampled_from(["monai", "even"]),
    batch_size=st.integers(1, 4),
    layout=st.sampled_from(["contiguous", "channels-last"]),
)
def test_slabs_give_the_logits_to_the_last_bit(size, roi, overlap, placement, batch_size, layout):
    """Each slice once and in order, whatever the axis, the padding and the memory layout of what the network gives."""

    def network(window):
        output = torch.cat([window * n + window.flip(-1) for n in range(3)], dim=1)
        return output.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "channels-last" else output

    x = noise(1, 1, *size)
    strategy = SubVolumes(roi, overlap, batch_size=batch_size, placement=placement)
    expected = strategy(x, network)[0]
    following = 0
    for slab in strategy.slabs(x, network):
        assert slab.start == following and slab.head is None
        following = slab.stop
        assert torch.equal(slab.values, expected[(slice(None), *slab.place)])
        assert torch.equal(slab.labels().long(), slab.logits().argmax(0))
    assert following == size[slab.axis]


def test_slabs_are_as_deep_as_a_window_whatever_the_length_of_the_image():
    depths = dict.fromkeys((20, 200), 0)
    for size in depths:
        held = set()
        for slab in SubVolumes(8, 0.5).slabs(noise(1, 1, 9, size, 9), identity):
            held.add(slab.values.untyped_storage().data_ptr())
            depths[size] = max(depths[size], slab.values.untyped_storage().nbytes())
            assert slab.axis == 1
        assert len(held) == 1
    assert depths[20] == depths[200] == 9 * 8 * 9 * 4


class Headed(torch.nn.Module):
    """Few features, many classes."""

    def __init__(self, classes=9, bias=True):
        super().__init__()
        self.body = torch.nn.Conv3d(1, 4, 3, padding=1)
        self.head = torch.nn.Conv3d(4, classes, 1, bias=bias)

    def forward(self, x):
        return self.head(self.body(x).relu())


@pytest.mark.parametrize("bias", [True, False])
def test_features_are_blended_where_they_are_fewer_than_the_classes(bias):
    torch.manual_seed(0)
    network, strategy, x = Headed(bias=bias).eval(), SubVolumes((6, 5, 4), 0.5), noise(2, 1, 13, 9, 8)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    with torch.no_grad():
        expected = strategy(x, network)
        for slab in strategy.slabs(x[1:], network):
            assert slab.head is not None and slab.values.shape[0] == 4
            torch.testing.assert_close(slab.logits(), expected[1][(slice(None), *slab.place)], rtol=0, atol=1e-5)
        labels = strategy.label_map(x, network)
    top = expected.topk(2, dim=1).values
    clear = (top[:, 0] - top[:, 1] > 1e-4)[:, None]
    assert clear.float().mean() > 0.95
    assert torch.equal(labels[clear].long(), expected.argmax(1, keepdim=True)[clear])
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert list(network.state_dict()) == list(state)


def test_a_convolution_that_is_not_the_last_step_is_no_head():
    class Squared(Headed):
        def forward(self, x):
            return super().forward(x) ** 2

    network, strategy, x = Squared().eval(), SubVolumes(6, 0.5), noise(1, 1, 9, 8, 8)
    with torch.no_grad():
        slabs = list(strategy.slabs(x, network))
        assert all(slab.head is None for slab in slabs)
        assert torch.equal(strategy.label_map(x, network).long(), strategy(x, network).argmax(1, keepdim=True))


def test_our_networks_have_a_head_to_take_off(monkeypatch):
    monkeypatch.setattr("medseg3d.inference.sub_volumes.SPLIT_FROM_WINDOWS", 1)
    from medseg3d.networks import SwinUNETR, UNet

    networks = (
        UNet(3, 1, 30, channels=[8, 16]),
        SwinUNETR(in_channels=1, out_channels=30, feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1)),
    )
    for network in networks:
        strategy, x = SubVolumes(64, 0.0), noise(1, 1, 64, 64, 64)
        with torch.inference_mode():
            slab = next(strategy.slabs(x, network.eval()))
            assert slab.head is not None
            torch.testing.assert_close(slab.logits(), strategy(x, network)[0], rtol=0, atol=1e-4)


def test_sums_in_bfloat16_are_close():
    x, network = noise(1, 3, 20, 9, 8), identity
    for slab in SubVolumes(6, 0.5, accumulate=torch.bfloat16).slabs(x, network):
        error = (slab.values.float() - x[0][(slice(None), *slab.place)]).abs()
        assert 0 < error.max() < 8 * 2**-9 * x.abs().max()


def test_logits_that_are_not_numbers_are_no_label():
    with pytest.raises(ValueError, match="not a number"):
        SubVolumes(4).label_map(torch.full((1, 3, 6, 6, 6), float("nan")), identity)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda w: (w, w), "labels need one tensor of logits, but the network returns a tuple"),
        (lambda w: w[..., ::2], "labels need logits at the image's resolution, but the network makes (4, 4, 2)"),
    ],
)
def test_labels_of_other_outputs(network, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SubVolumes(4).label_map(noise(1, 1, 6, 6, 6), network)


def test_even_windows_are_nnunets():
    assert window_starts([10, 20, 5], [4, 8, 5], [0.5, 0.5, 0.5], "even") == [[0, 2, 4, 6], [0, 4, 8, 12], [0]]
    assert window_starts([11], [4], [0.5], "even") == [[0, 2, 4, 5, 7]]


def test_progress_is_told_after_each_batch():
    told = []
    strategy = SubVolumes(4, 0.0, batch_size=3, progress=lambda done, total: told.append((done, total)))
    strategy(noise(1, 1, 8, 8, 8), identity)
    assert told == [(3, 8), (6, 8), (8, 8)]


def test_further_arguments_reach_the_network():
    result = SubVolumes(4)(torch.ones(1, 1, 6, 6, 6), lambda window, a, b=0: a * window + b, 2.0, b=3.0)
    torch.testing.assert_close(result, torch.full_like(result, 5.0))


def test_importance_is_symmetric_and_never_below_a_thousandth():
    weight = importance_map((9, 4, 6))
    for axis in range(3):
        torch.testing.assert_close(weight, weight.flip(axis))
    assert weight.min() == 1e-3 and weight[4, 1, 2] == weight.max()
    assert (importance_map((3, 2), "constant") == 1).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"blend": "linear"}, "blend must be one of gaussian, constant, got 'linear'"),
        ({"overlap": 1.0}, "overlap must lie in [0, 1), got 1.0"),
        ({"overlap": (0.5, -0.1, 0.5)}, "overlap must lie in [0, 1)"),
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"placement": "odd"}, "placement must be one of monai, even, got 'odd'"),
        ({"accumulate": torch.float16}, "accumulate must be torch.float32 or torch.bfloat16, got torch.float16"),
        ({"padding_mode": "wrap"}, "padding_mode must be one of constant, reflect, replicate, circular, got 'wrap'"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SubVolumes(8, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"roi_size": (8, 8)}, "roi_size (8, 8) is for 2 spatial axes, but the image has 3: (6, 6, 6)"),
        ({"roi_size": 4, "overlap": (0.5, 0.5)}, "overlap (0.5, 0.5) is for 2 spatial axes, but the image has 3"),
        ({"roi_size": 20, "padding_mode": "circular"}, "circular padding cannot grow axis 0 from 6 to 20 voxels"),
        ({"roi_size": 4, "weight_map": torch.ones(3, 4, 4)}, "weight_map must have the window's shape (4, 4, 4)"),
    ],
)
def test_arguments_that_do_not_fit_the_image(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SubVolumes(**arguments)(torch.zeros(1, 1, 6, 6, 6), identity)

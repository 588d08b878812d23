"""Properties of sub-volume inference that hold for every size, overlap and network."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg3d.inference import SubVolumes
from medseg3d.inference.windows import importance_map, windows

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
        ({"roi_size": 20, "padding_mode": "reflect"}, "reflect padding cannot grow axis 0 from 6 to 20 voxels"),
        ({"roi_size": 20, "padding_mode": "circular"}, "circular padding cannot grow axis 0 from 6 to 20 voxels"),
        ({"roi_size": 4, "weight_map": torch.ones(3, 4, 4)}, "weight_map must have the window's shape (4, 4, 4)"),
    ],
)
def test_arguments_that_do_not_fit_the_image(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SubVolumes(**arguments)(torch.zeros(1, 1, 6, 6, 6), identity)

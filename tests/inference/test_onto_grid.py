"""Labels on another grid, from slabs: those that interpolating every class gives, in any orientation and any slabs."""

from __future__ import annotations

import tracemalloc
from itertools import permutations, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.special import softmax
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from medseg3d.data.transforms import labels_by_interpolation
from medseg3d.geometry import Chain, Geometry
from medseg3d.inference import onto_grid
from medseg3d.inference.grid_map import along, between, edge_to_edge
from medseg3d.inference.onto_grid import labels_onto, values_onto
from medseg3d.inference.slabs import Head, Slab

CODES = ["".join(codes) for axes in permutations(("RL", "AP", "SI")) for codes in product(*axes)]
AFFINE = np.diag([0.8, 1.0, 2.5, 1.0])


def smooth(channels, shape, seed=0, sigma=1.5):
    """(channels, *shape) float32 of about unit variance, smooth enough for regions of many voxels."""
    noise = np.random.default_rng(seed).standard_normal((channels, *shape))
    smoothed = ndimage.gaussian_filter(noise, (0, *[sigma] * len(shape)))
    return (smoothed / smoothed.std()).astype(np.float32)


def slabs(values, axis=0, thickness=3, head=None):
    """Slabs whose memory is overwritten once the next is asked for."""
    for start in range(0, values.shape[1 + axis], thickness):
        part = torch.from_numpy(values).narrow(1 + axis, start, min(thickness, values.shape[1 + axis] - start)).clone()
        yield Slab(axis, start, part, head)
        part.fill_(float("nan"))


def assert_argmax(labels, logits):
    """Equal to the argmax, but for voxels whose two largest logits differ by rounding."""
    assert labels.shape == logits.shape[1:]
    wrong = labels != logits.argmax(axis=0)
    largest = np.sort(logits, axis=0)
    assert (largest[-1] - largest[-2])[wrong].max(initial=0) < 1e-5
    assert wrong.mean() < 1e-3


def way_back(shape, codes, spacing, crop):
    """The frame from a network's grid, turned, cropped and resampled, to the scan's own."""
    reorient = Geometry(shape, AFFINE).reorient(codes)
    margin = np.array(reorient.target.shape) // 4 if crop else np.zeros(3, int)
    cropped = reorient.target.crop(margin, reorient.target.shape - margin // 2)
    return Chain([reorient, cropped, cropped.target.resample(spacing)]).inverse()


@pytest.mark.parametrize("codes", CODES)
def test_equal_to_interpolating_every_class_in_every_orientation(codes):
    number = CODES.index(codes)
    spacing = [(1.5, 1.5, 1.5), (0.5, 1.3, 2.5), (2.0, 0.6, 4.0)][number % 3]
    frame = way_back((19, 16, 12), codes, spacing, crop=number % 2 == 0)
    logits = smooth(4, frame.source.shape, seed=number)
    labels = labels_onto(slabs(logits, axis=number % 3, thickness=1 + number % 5), along(frame))
    assert labels.dtype == np.uint8
    assert len(np.unique(labels)) == 4
    assert_argmax(labels, np.stack([frame.image(logits[n]) for n in range(4)]))
    assert (labels != labels_by_interpolation(frame, logits)).mean() < 1e-3


sizes = st.tuples(*[st.integers(1, 14)] * 3)


@settings(max_examples=60, deadline=None)
@given(sizes, sizes, st.integers(0, 2), st.integers(1, 15), st.integers(0, 99))
def test_any_sizes_and_any_slabs(source, target, axis, thickness, seed):
    logits = smooth(3, source, seed, sigma=1)
    frame = Geometry(source, AFFINE).resample(shape=target)
    labels = labels_onto(slabs(logits, axis, thickness), edge_to_edge(source, target))
    assert_argmax(labels, frame.image(logits))


@pytest.mark.parametrize("spacing", [1.1, 3.7])  # finer and coarser, where the triangle is wide
def test_padding_before_another_resampling(spacing):
    grid = Geometry((9, 8, 7), AFFINE)
    padded = grid.pad((2, 0, 1), (1, 3, 0))
    frame = Chain([padded, padded.target.resample(spacing), padded.target.resample(spacing).target.reorient("PIR")])
    logits = smooth(3, grid.shape) - 5  # below what lies outside
    labels = labels_onto(slabs(logits), along(frame))
    moved = np.stack([frame.image(logits[n]) for n in range(3)])
    assert_argmax(labels, moved)
    assert (labels[(moved == 0).all(axis=0)] == 0).all()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_head_is_applied_after_the_interpolation(axis):
    frame = way_back((19, 16, 12), "PIR", 1.4, crop=True)
    features, rng = smooth(3, frame.source.shape), np.random.default_rng(1)
    head = Head(torch.from_numpy(rng.normal(size=(7, 3)).astype(np.float32)), torch.linspace(-0.5, 0.5, 7))
    logits = head(torch.from_numpy(features).flatten(1)).view(7, *features.shape[1:]).numpy()
    labels = labels_onto(slabs(features, axis, 4, head), along(frame))
    assert_argmax(labels, np.stack([frame.image(logits[n]) for n in range(7)]))


@pytest.mark.parametrize("with_head", [False, True])
def test_probabilities_are_interpolated_on_request(with_head):
    frame = way_back((19, 16, 12), "PIR", 0.7, crop=True)
    values = 4 * smooth(3, frame.source.shape)
    head = Head(torch.linspace(-2, 2, 15).view(5, 3).sin()) if with_head else None
    logits = head(torch.from_numpy(values).flatten(1)).view(5, *values.shape[1:]).numpy() if head else values
    labels = labels_onto(slabs(values, 1, 4, head), along(frame), softmax=True)
    moved = [frame.image(channel) for channel in softmax(logits, axis=0)]
    assert_argmax(labels, np.stack(moved))
    assert (labels != labels_onto(slabs(values, 1, 4, head), along(frame))).any()


def test_other_layouts_and_types_give_the_same():
    frame = way_back((19, 16, 12), "PIR", 1.4, crop=False)
    logits = torch.from_numpy(smooth(4, frame.source.shape)).bfloat16()
    expected = labels_onto([Slab(0, 0, logits.float())], along(frame))
    channels_last = logits.movedim(0, -1).contiguous().movedim(-1, 0)
    np.testing.assert_array_equal(labels_onto([Slab(1, 0, channels_last)], along(frame)), expected)
    np.testing.assert_array_equal(labels_onto([Slab(2, 0, logits)], along(frame)), expected)


def test_small_groups_and_blocks_change_nothing(monkeypatch):
    frame = way_back((19, 16, 12), "RAS", 1.4, crop=True)
    logits = smooth(4, frame.source.shape)
    expected = labels_onto(slabs(logits, 2, 5), along(frame))
    monkeypatch.setattr(onto_grid, "GROUP", 100)
    monkeypatch.setattr(onto_grid, "BLOCK", 7)
    np.testing.assert_array_equal(labels_onto(slabs(logits, 2, 5), along(frame)), expected)


@pytest.mark.parametrize("codes", CODES[::5])
def test_nearest_moves_the_labels(codes):
    frame = way_back((19, 16, 12), codes, (1.5, 0.6, 3.1), crop=True)
    logits = smooth(4, frame.source.shape)
    for axis in range(3):
        moved = labels_onto(slabs(logits, axis, 4), along(frame, order=0))
        np.testing.assert_array_equal(moved, frame.label_map(logits.argmax(axis=0)))


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("codes", CODES[::5])
def test_two_grids_in_space_are_enough(codes, order):
    """Also where the affines went through a file's rounded numbers."""
    frame = way_back((19, 16, 12), codes, (1.5, 0.6, 3.1), crop=True)
    source, target = (Geometry(g.shape, g.affine.astype(np.float32)) for g in (frame.source, frame.target))
    for one, other in zip(between(source, target, order), along(frame, order), strict=True):
        assert one.axis == other.axis
        np.testing.assert_allclose(one.weights, other.weights, atol=1e-5)


def test_an_oblique_grid_is_refused():
    turn = np.eye(4)
    turn[:2, :2] = [[0.999, -0.0447], [0.0447, 0.999]]
    with pytest.raises(ValueError, match=r"axes that part by .* voxels"):
        between(Geometry((20, 20, 5), np.eye(4)), Geometry((20, 20, 5), turn))


def test_grids_that_do_not_meet():
    far = np.eye(4)
    far[:3, 3] = 100
    maps = between(Geometry((4, 4, 4), np.eye(4)), Geometry((3, 5, 6), far))
    labels = labels_onto(slabs(smooth(3, (4, 4, 4)) - 5), maps)
    assert labels.shape == (3, 5, 6) and not labels.any()


def test_images_of_two_axes():
    logits = smooth(3, (14, 11))
    labels = labels_onto(slabs(logits, 1, 4), edge_to_edge((14, 11), (30, 17)))
    moved = Geometry((14, 11, 1), np.eye(4)).resample(shape=(30, 17, 1)).image(logits[..., None])[..., 0]
    assert_argmax(labels, moved)


@pytest.mark.parametrize(("classes", "dtype"), [(255, np.uint8), (256, np.uint8), (257, np.uint16)])
def test_as_many_bits_as_the_classes_need(classes, dtype):
    logits = np.zeros((classes, 2, 3, 2), np.float32)
    logits[-1, :, 0] = logits[-2, :, 1:] = 1
    labels = labels_onto(slabs(logits), edge_to_edge((2, 3, 2), (4, 9, 4)))
    assert labels.dtype == dtype
    assert set(np.unique(labels)) == {classes - 2, classes - 1}


def test_ties_go_to_the_lower_class():
    assert not labels_onto(slabs(np.ones((3, 4, 4, 4), np.float32)), edge_to_edge((4, 4, 4), (9, 9, 9))).any()
    two_of_three = np.stack([np.zeros((4, 4, 4)), np.ones((4, 4, 4)), np.ones((4, 4, 4))]).astype(np.float32)
    assert (labels_onto(slabs(two_of_three), edge_to_edge((4, 4, 4), (9, 9, 9))) == 1).all()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_values_are_interpolated(axis):
    frame = way_back((19, 16, 12), "PIR", (1.4, 0.7, 3.1), crop=True)
    entropy = smooth(1, frame.source.shape)
    moved = values_onto(slabs(entropy, axis, 4), along(frame))
    assert moved.dtype == np.float32
    np.testing.assert_allclose(moved, frame.image(entropy[0]), atol=1e-6)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation gave."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return result


def test_memory_is_that_of_a_slab_and_the_labels(monkeypatch):
    """However long the scan is; interpolated logits of all its voxels would take 60 times as much and more."""
    monkeypatch.setattr(onto_grid, "GROUP", 2**12)
    monkeypatch.setattr(onto_grid, "BLOCK", 2**10)
    largest, classes = {}, 12
    for length in (40, 160):
        wave = torch.sin(torch.linspace(0, length / 5, length)).view(-1, 1, 1).expand(length, 16, 16)
        tilt = torch.linspace(-1, 1, classes).view(-1, 1, 1, 1)
        parts = (Slab(0, start, wave[start : start + 4] * tilt) for start in range(0, length, 4))
        maps = edge_to_edge((length, 16, 16), (2 * length, 32, 32))
        tracemalloc.start()
        with Largest() as most:
            labels = labels_onto(parts, maps)
        numpy_peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(np.unique(labels)) == 2
        largest[length] = most.bytes
    assert numpy_peak < 2 * labels.nbytes  # of the second run: the first imports
    slab = classes * 4 * 16 * 16 * 4
    assert largest[160] <= largest[40] <= 2 * slab
    assert classes * 320 * 32 * 32 * 4 > 60 * 2 * slab


@pytest.mark.parametrize("softmax", [False, True])
def test_classes_that_are_ruled_out_leave_numbers(softmax):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 6, 5, 4, generator=generator)
    logits[0] = float("-inf")
    logits[1, :3] = float("-inf")
    maps = edge_to_edge((6, 5, 4), (11, 5, 9))
    finite = labels_onto([Slab(0, 0, logits.clamp_min(-1e4))], maps, softmax)
    assert np.array_equal(labels_onto([Slab(0, 0, logits)], maps, softmax), finite)
    assert set(np.unique(finite)) == {1, 2}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: edge_to_edge((4, 4), (4, 4, 4)), "as many axes"),
        (lambda: edge_to_edge((4, 0), (4, 4)), "1 voxel or more"),
        (lambda: edge_to_edge((4, 4), (4, 4), order=3), r"order of interpolation is 0 \(nearest\) or 1"),
        (lambda: labels_onto([], edge_to_edge((4, 4), (4, 4))), "end before the source grid"),
        (lambda: labels_onto([Slab(0, 0, torch.zeros(2, 2, 4))], edge_to_edge((4, 4), (4, 4))), "end before"),
        (lambda: labels_onto([Slab(0, 0, torch.zeros(2, 4, 5))], edge_to_edge((4, 4), (4, 4))), "within the maps'"),
        (lambda: labels_onto([Slab(0, 0, torch.zeros(2, 5, 4))], edge_to_edge((4, 4), (4, 4))), "within the maps'"),
        (
            lambda: labels_onto([Slab(0, 0, torch.ones(2, 4, 4) * np.nan)], edge_to_edge((4, 4), (9, 9))),
            "not a number",
        ),
        (lambda: values_onto([Slab(0, 0, torch.zeros(2, 4, 4))], edge_to_edge((4, 4), (4, 4))), "one channel"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()

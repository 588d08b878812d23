"""Windows that are cut out, turned, scaled and bent at once, against SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.transforms import ClassesToIndices
from scipy import interpolate, ndimage

from medseg3d.data.augmentation import (
    FOLDS_AT,
    RandAffineCropd,
    bspline_weights,
    free_form,
    rotation,
    sample,
    sampling_grid,
)


def volume(shape, seed=0):
    """A smooth image and a label map of three classes, (1, *shape)."""
    generator = np.random.default_rng(seed)
    image = ndimage.gaussian_filter(generator.normal(size=shape), 1.5).astype(np.float32)
    label = np.digitize(image, np.quantile(image, [0.6, 0.85])).astype(np.uint8)
    return {"image": torch.from_numpy(image)[None], "label": torch.from_numpy(label)[None]}


def data(shape, seed=0):
    item = volume(shape, seed)
    return item | {"label_cls_indices": ClassesToIndices(num_classes=3)(item["label"]), "case": "a"}


def transform(size, seed=0, **options):
    crop = RandAffineCropd(["image", "label"], "label", size, **{"ratios": [1, 1, 1], **options})
    return crop.set_random_state(seed)


@pytest.mark.parametrize(
    ("shape", "size", "angles"), [((23, 18, 30), (8, 10, 12), [0.3, -0.2, 0.5]), ((30, 40), (12, 9), [0.7])]
)
def test_it_shows_what_scipy_shows(shape, size, angles):
    item = volume(shape)
    matrix = rotation(angles) * np.linspace(0.8, 1.3, len(shape))
    center = np.array(shape) * 0.55
    grid = sampling_grid(shape, matrix, center, size, torch.device("cpu"))
    offset = center - matrix @ ((np.array(size) - 1) / 2)
    for key, order, mode in (("image", 1, "bilinear"), ("label", 0, "nearest")):
        expected = ndimage.affine_transform(item[key][0].numpy(), matrix, offset, size, order=order, mode="nearest")
        got = sample(item[key], grid, mode)
        assert got.dtype == item[key].dtype
        if mode == "bilinear":
            np.testing.assert_allclose(got[0], expected, atol=1e-4)
        else:
            assert (got[0].numpy() != expected).mean() < 0.002  # a voxel halfway between two may go either way


@pytest.mark.parametrize(("shape", "size"), [((23, 18, 30), (8, 10, 12)), ((30, 40), (12, 9))])
def test_it_bends_as_scipy_does(shape, size):
    item, axes = volume(shape), len(shape)
    displacement = np.random.default_rng(0).uniform(-2, 2, (axes, *size)).astype(np.float32)
    matrix = rotation([0.3] * (3 if axes == 3 else 1)) * np.linspace(0.8, 1.3, axes)
    center, half = np.array(shape) * 0.5, (np.array(size) - 1).reshape(-1, *(1,) * axes) / 2
    grid = sampling_grid(shape, matrix, center, size, torch.device("cpu"), torch.from_numpy(displacement))
    where = np.tensordot(matrix, np.indices(size) + displacement - half, 1) + center.reshape(half.shape)
    expected = ndimage.map_coordinates(item["image"][0].numpy(), where, order=1, mode="nearest")
    np.testing.assert_allclose(sample(item["image"], grid, "bilinear")[0], expected, atol=1e-4)


@pytest.mark.parametrize(("voxels", "spacing"), [(64, 16), (33, 16), (17, 5.5), (1, 4)])
def test_bsplines_are_those_of_scipy(voxels, spacing):
    got = bspline_weights(voxels, spacing)
    knots = np.arange(-3, got.shape[1] + 1, dtype=float)
    expected = interpolate.BSpline.design_matrix(np.arange(voxels) / spacing, knots, 3).toarray()
    np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("size", [(40, 36), (24, 20, 28)])
def test_the_largest_deformation_does_not_fold(size):
    axes, spacing = len(size), 8
    weights = [bspline_weights(voxels, spacing) for voxels in size]
    points = torch.rand(axes, *(one.shape[1] for one in weights), generator=torch.Generator().manual_seed(0))
    moved = free_form((points > 0.5).float() * 2 - 1, weights) * spacing / FOLDS_AT[axes]
    rows = [torch.stack(torch.gradient(moved[axis]), -1) for axis in range(axes)]
    jacobian = torch.eye(axes) + torch.stack(rows, -2)
    assert torch.linalg.det(jacobian).min() > 0
    assert moved.abs().max() > 1


@pytest.mark.parametrize(("shape", "size"), [((20, 24, 22), (8, 6, 10)), ((24, 30), (8, 11))])
def test_without_turns_it_is_a_crop(shape, size):
    item = data(shape)
    for seed in range(20):
        got = transform(size, seed)(item)
        windows = item["image"][0]
        for axis, voxels in enumerate(size):
            windows = windows.unfold(axis, voxels, 1)
        assert (windows - got["image"][0]).abs().flatten(len(shape)).amax(-1).min() < 1e-5
        assert "label_cls_indices" not in got and got["case"] == "a"


def test_the_chosen_class_is_in_the_middle():
    item = volume((50, 50))
    item["label"][:] = 0
    item["label"][:, 20:25, 10:30], item["label"][:, 30, 30] = 1, 2  # one is a hundred times larger
    item["label_cls_indices"] = ClassesToIndices(num_classes=3)(item["label"])
    middles = [int(transform((5, 5), seed, ratios=[0, 1, 3])(item)["label"][0, 2, 2]) for seed in range(200)]
    assert np.bincount(middles, minlength=3) / 200 == pytest.approx([0, 0.25, 0.75], abs=0.1)


def test_a_class_that_is_not_there_is_not_chosen():
    item = volume((20, 20))
    item["label"][item["label"] == 2] = 0
    item["label_cls_indices"] = ClassesToIndices(num_classes=3)(item["label"])
    assert (transform((5, 5), ratios=[0, 1, 1000])(item)["label"] > 0).any()
    with pytest.raises(ValueError, match="no voxel of any class"):
        transform((5, 5), ratios=[0, 0, 1])(item)


def test_the_window_lies_within_the_volume_unless_that_is_smaller():
    ones = {"image": torch.ones(1, 12, 40), "label": torch.ones(1, 12, 40, dtype=torch.uint8)}
    ramp = torch.arange(40.0).expand(1, 12, 40).clone()
    for seed in range(30):
        item = {**ones, "image": ramp, "label_cls_indices": [[], np.arange(480), []]}
        got = transform((16, 16), seed)(item)["image"][0]
        steps = got.diff(dim=1)
        assert torch.allclose(steps, torch.ones_like(steps), atol=1e-4)  # nowhere the continued border
        assert got.diff(dim=0).abs().max() < 1e-4


def test_it_is_repeated_by_its_seed_and_changes_nothing():
    item = data((20, 20, 20))
    before = item["image"].clone(), item["label"].clone()
    options = {"rotate": [0.2, 0.2, 0.4], "scale": 0.2, "translate": 3, "deform": 4}
    first, again, other = (transform((9, 9, 9), seed, **options)(item) for seed in (3, 3, 4))
    assert torch.equal(first["image"], again["image"]) and not torch.equal(first["image"], other["image"])
    assert torch.equal(before[0], item["image"]) and torch.equal(before[1], item["label"])
    assert "label_cls_indices" in item


def test_image_and_label_stay_together():
    item = data((24, 24, 24))
    threshold = item["image"][item["label"] == 2].min()
    for seed in range(5):
        got = transform((12, 12, 12), seed, rotate=[0.3] * 3, scale=[0.2] * 3, deform=[4, 5, 6])(item)
        agreement = ((got["image"] >= threshold) == (got["label"] == 2)).float().mean()
        assert agreement > 0.85  # they differ at outlines alone; a window elsewhere agrees in 0.75


def millimetres(shape, spacing):
    """Where each voxel lies, in mm from the first: (3, *shape)."""
    return torch.from_numpy(np.indices(shape) * np.reshape(spacing, (3, 1, 1, 1))).float()


@pytest.mark.parametrize("turned", [False, True])
def test_windows_have_their_spacing_whatever_the_volumes(turned):
    shape, spacing, wanted, size = (40, 44, 50), (3.9, 4.7, 2.0), (3.0, 3.0, 2.5), (10, 12, 8)
    places = millimetres(shape, spacing)
    item = {
        "image": places,
        "label": torch.zeros(1, *shape),
        "label_cls_indices": [[np.ravel_multi_index((20, 22, 25), shape)], [], []],
        "spacing": torch.tensor(spacing),
    }
    options = {"rotate": [0.3] * 3, "translate": 2} if turned else {}
    got = transform(size, spacing=wanted, **options)(item)
    steps = [(got["image"].diff(dim=axis + 1).flatten(1).mean(1) / wanted[axis]) for axis in range(3)]
    jacobian = torch.stack(steps, 1)
    torch.testing.assert_close(jacobian.T @ jacobian, torch.eye(3), atol=1e-3, rtol=0)  # turned in mm, not in voxels
    assert torch.allclose(jacobian, torch.eye(3), atol=1e-3) != turned
    middle = got["image"].flatten(1).mean(1)
    most = [2 * one * turned + one for one in np.maximum(wanted, spacing)]
    assert ((middle - torch.tensor([20, 22, 25]) * torch.tensor(spacing)).abs() < torch.tensor(most)).all()
    assert got["spacing"] is item["spacing"]


def test_windows_of_another_spacing_lie_within_the_volume_too():
    shape, spacing = (30, 30), (2.0, 5.0)
    ramp = torch.arange(30.0)[:, None] * 2 + torch.arange(30.0) * 5
    for seed in range(20):
        item = {"image": ramp[None], "label": torch.ones(1, *shape), "spacing": torch.tensor(spacing)}
        item["label_cls_indices"] = [[], np.arange(900), []]
        got = transform((16, 16), seed, spacing=(3, 3))(item)["image"][0]
        assert all(torch.allclose(got.diff(dim=axis), torch.tensor(3.0), atol=1e-3) for axis in (0, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rotate": [0.1, 0.1]}, "rotate must be 3 numbers"),
        ({"scale": -0.1}, "scale must be 3 numbers of 0 or more"),
        ({"deform": [1, 7, 1]}, "deform may be at most control_spacing / 2.48, here 6.45.* got 7"),
        ({"deform": 4, "control_spacing": 8}, "here 3.23"),
        ({"ratios": [1, 1]}, "3 classes, but 2 ratios"),
        ({"spacing": [3, 3]}, "spacing must be 3 numbers of mm above 0"),
        ({"spacing": [3, 3, 0]}, "spacing must be 3 numbers of mm above 0"),
        ({"spacing": [3, 3, 3]}, "spacing in 'spacing': give ToModelGridd"),
    ],
)
def test_what_it_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        transform((4, 4, 4), **options)(data((8, 8, 8)))

"""Recipes: what is recognised of a bundle, and that the labels are those of the bundle carried out as it stands."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from monai.inferers import SimpleInferer, SlidingWindowInferer
from monai.transforms import (
    Activationsd,
    AsDiscreted,
    Compose,
    EnsureTyped,
    Invertd,
    Orientationd,
    SqueezeDimd,
)
from torch import nn

import medseg3d as ms
from medseg3d.data.transforms import LabelsOnInputGridd, ToModelGridd
from medseg3d.inference import CoarseToFine, Downsampled, Slices, SubVolumes
from medseg3d.recipe import INTERPOLATE, MOVE_LABELS, as_strategy, find_recipe, strategy_named
from tests import tiny_bundles as tiny
from tests.test_segmenter import GRIDS

TO_RAS = Compose([Orientationd("image", axcodes="RAS")])


def softmax(keys="pred", **options):
    return Activationsd(keys, softmax=True, **options)


def argmax(keys="pred", **options):
    return AsDiscreted(keys, argmax=True, **options)


def inverse(keys="pred", orig_keys="image", **options):
    return Invertd(keys, TO_RAS, orig_keys, **options)


def linear_inverse(**options):
    return inverse(nearest_interp=False, **options)


def labels_on_grid(keys="pred", orig_keys="image"):
    return LabelsOnInputGridd(keys, orig_keys)


def found(*steps, inferer=None):
    return find_recipe(SubVolumes(32) if inferer is None else inferer, Compose(list(steps)))


# What is recognised


@pytest.mark.parametrize(
    ("steps", "order", "by_softmax", "by_frame"),
    [
        ([labels_on_grid()], INTERPOLATE, False, True),
        ([linear_inverse(), argmax()], INTERPOLATE, False, False),
        ([softmax(), linear_inverse(), argmax()], INTERPOLATE, True, False),
        ([softmax(), inverse(), argmax()], MOVE_LABELS, True, False),
        ([inverse(), argmax()], MOVE_LABELS, False, False),
        ([softmax(), argmax(), inverse()], MOVE_LABELS, True, False),
        ([argmax(), inverse()], MOVE_LABELS, False, False),
        ([EnsureTyped("pred"), softmax(), EnsureTyped("pred"), linear_inverse(), argmax()], INTERPOLATE, True, False),
        ([Compose([softmax(), Compose([linear_inverse()])]), argmax()], INTERPOLATE, True, False),
    ],
)
def test_recognised(steps, order, by_softmax, by_frame):
    recipe = found(*steps)
    assert (recipe.order, recipe.softmax, recipe.by_frame) == (order, by_softmax, by_frame)
    assert not recipe.rest.transforms


def test_what_comes_after_is_kept():
    last = SqueezeDimd("pred")
    for steps in ([labels_on_grid()], [softmax(), linear_inverse(), argmax()], [argmax(), inverse()]):
        assert list(found(*steps, last).rest.transforms) == [last]


@pytest.mark.parametrize(
    "steps",
    [
        [],
        [argmax()],
        [softmax()],
        [inverse()],
        [softmax(), linear_inverse()],
        [Activationsd("pred", sigmoid=True), linear_inverse(), argmax()],
        [Activationsd("pred", softmax=True, other=torch.tanh), linear_inverse(), argmax()],
        [softmax("image"), linear_inverse(), argmax()],
        [softmax(dim=1), linear_inverse(), argmax()],
        [softmax(), softmax(), linear_inverse(), argmax()],
        [linear_inverse(), argmax(to_onehot=3)],
        [linear_inverse(), argmax(threshold=0.5)],
        [linear_inverse(), argmax(threshold=0.0)],
        [linear_inverse(), argmax(rounding="torchrounding")],
        [linear_inverse(), argmax(dim=1)],
        [linear_inverse(), argmax(keepdim=False)],
        [linear_inverse(), AsDiscreted("pred", threshold=0.5)],
        [linear_inverse(), argmax("label")],
        [linear_inverse(), argmax(["pred", "label"])],
        [inverse("label"), argmax()],
        [inverse(["pred", "label"]), argmax()],
        [inverse(orig_keys="label"), argmax()],
        [linear_inverse(post_func=torch.relu), argmax()],
        [inverse(), softmax(), argmax()],
        [inverse(), SqueezeDimd("pred"), argmax()],
        [argmax(), linear_inverse()],  # numbers of labels would be interpolated
        [argmax(), SqueezeDimd("pred"), inverse()],
        [linear_inverse(), argmax(), inverse()],
        [argmax(), inverse(), argmax()],
        [labels_on_grid(), inverse()],
        [labels_on_grid(), labels_on_grid()],
        [labels_on_grid("label")],
        [labels_on_grid(orig_keys="label")],
        [softmax(), labels_on_grid()],
    ],
)
def test_not_recognised(steps):
    assert found(*steps) is None


def test_a_function_is_carried_out_as_it_stands():
    assert find_recipe(SubVolumes(32), lambda data: data) is None


# Inferers


def test_arguments_of_sliding_windows_are_carried_over():
    given = SlidingWindowInferer(
        roi_size=(32, 24, 16), sw_batch_size=3, overlap=(0.5, 0.25, 0.0), mode="gaussian", sigma_scale=0.2,
        padding_mode="reflect", cval=-1.5, device="cpu",
    )  # fmt: skip
    own = as_strategy(given)
    assert isinstance(own, SubVolumes)
    assert (own.roi_size, own.batch_size, tuple(own.overlap)) == ((32, 24, 16), 3, (0.5, 0.25, 0.0))
    assert (own.blend, own.sigma_scale, own.padding_mode) == ("gaussian", 0.2, "reflect")
    assert (own.padding_value, own.device, own.weight_map) == (-1.5, torch.device("cpu"), None)
    assert own.placement == "monai"
    image, layer = torch.randn(1, 1, 40, 30, 20), nn.Conv3d(1, 2, 3, padding=1)
    with torch.no_grad():
        torch.testing.assert_close(own(image, layer), given(image, layer), rtol=0, atol=1e-5)


def test_defaults_and_a_cached_weight_map():
    own = as_strategy(SlidingWindowInferer(16))
    assert (own.blend, own.overlap, own.padding_mode, own.batch_size) == ("constant", 0.25, "constant", 1)
    cached = SlidingWindowInferer((16, 16, 16), mode="gaussian", cache_roi_weight_map=True, device="cpu")
    assert as_strategy(cached).weight_map is cached.roi_weight_map is not None


def test_a_simple_inferer_is_one_window():
    image = torch.randn(1, 1, 9, 8, 7)
    seen = []

    def network(window):
        seen.append(tuple(window.shape))
        return torch.cat([window, -window], 1)

    own = as_strategy(SimpleInferer())
    torch.testing.assert_close(own(image, network), torch.cat([image, -image], 1))
    assert seen == [tuple(image.shape)] and own.count((9, 8, 7)) == 1


def test_other_inferers_are_not_known():
    class Own(SlidingWindowInferer):
        pass

    for inferer in (Own(16), SlidingWindowInferer(16, with_coord=True), lambda image, network: image):
        assert as_strategy(inferer) is None
        assert found(argmax(), inverse(), inferer=inferer) is None
    for strategy in (SubVolumes(8), Slices(), Downsampled(), CoarseToFine()):
        assert as_strategy(strategy) is strategy


# The same labels


def post(config):
    return config["postprocessing"]["transforms"]


def without_softmax(config):
    del post(config)[0]


def nearest(config):
    post(config)[1]["nearest_interp"] = True


def labels_moved(config):
    nearest(config)
    post(config)[1:3] = post(config)[2:0:-1]


def finer_than_scans(config):
    config["preprocessing"]["transforms"][3]["pixdim"] = [3.0, 3.0, 3.0]


def axes_of_the_patient(config):
    """An oblique scan is turned, so its grid is oblique to the network's."""
    config["preprocessing"]["transforms"][3]["diagonal"] = True


def downsampled(config):
    without_softmax(config)
    config["inferer"] = {"_target_": "medseg3d.inference.Downsampled", "size": [24, 24, 24]}


FORMS = [without_softmax, nearest, labels_moved, finer_than_scans, axes_of_the_patient, downsampled]


@pytest.fixture(scope="module", params=["own", "zoo", *FORMS], ids=lambda form: getattr(form, "__name__", form))
def model(request, models, tmp_path_factory):
    if isinstance(request.param, str):
        return getattr(models, request.param)
    folder = tmp_path_factory.mktemp("forms") / request.param.__name__
    return ms.load_model(tiny.write_zoo_bundle(folder, edit=request.param), "cpu", trust=True, precision="fp32")


@pytest.mark.parametrize("grid", ["as made", "anisotropic", "oblique", "sheared", "flipped"])
def test_labels_are_those_of_the_bundle_as_it_stands(grid, model, monkeypatch):
    grids = {"as made": (-4 * np.eye(3), tiny.SHAPE), "flipped": (np.diag([4.0, -4.0, -3.0]), (40, 36, 44))}
    matrix, shape = (grids | GRIDS)[grid]
    affine = tiny.centred(matrix, shape)
    scan = tiny.ct(affine, shape), affine
    lean = model.predict(scan).segmentation.array
    assert find_recipe(model.inferer, model.postprocessing) is not None
    monkeypatch.setattr("medseg3d.segmenter.find_recipe", lambda *parts: None)
    as_it_stands = model.predict(scan).segmentation.array
    assert len(np.unique(as_it_stands)) == 3
    assert np.count_nonzero(lean != as_it_stands) <= 2  # ties, which rounding decides


def test_a_bundle_whose_numbers_of_labels_are_interpolated_is_left_alone(tmp_path):
    def edit(config):
        post(config)[1:3] = post(config)[2:0:-1]

    model = ms.load_model(tiny.write_zoo_bundle(tmp_path / "bundle", edit=edit), "cpu", trust=True, precision="fp32")
    assert find_recipe(model.inferer, model.postprocessing) is None
    assert model.predict((tiny.ct(), tiny.LPS)).segmentation.shape == tiny.SHAPE


def test_a_missing_record_of_the_way_is_an_error_of_maps():
    recipe = found(labels_on_grid())
    image = SimpleNamespace(applied_operations=[], shape=(1, 4, 4, 4), affine=torch.eye(4))
    with pytest.raises(ValueError, match=ToModelGridd.__name__):
        recipe.maps(image, ms.Geometry((4, 4, 4), np.eye(4)))


@pytest.mark.parametrize("step", [0.5, 1.0, 2.5, 4.0])
def test_a_way_back_by_invertd_takes_two_voxels_however_coarse_the_scan_is(step):
    """In one dimension, by hand: slice n of the scan lies at n * step of the network's grid."""
    recipe = found(linear_inverse(), argmax())
    size = int(10 // step)
    image = SimpleNamespace(shape=(1, 11, 4, 4), affine=torch.eye(4))
    one, *_ = recipe.maps(image, ms.Geometry((size, 4, 4), np.diag([step, 1.0, 1.0, 1.0])))
    expected = np.maximum(0, 1 - np.abs(np.arange(size)[:, None] * step - np.arange(11)))
    assert one.axis == 0
    np.testing.assert_allclose(one.weights, expected, atol=1e-9)


# Strategies by name


def test_strategies_by_name():
    volume, flat = nn.Conv3d(1, 2, 1), nn.Sequential(nn.Conv2d(1, 2, 1))
    own = SubVolumes(48, 0.25)
    assert strategy_named("sub-volumes", volume, own) is own
    assert strategy_named("sub-volumes", volume, None).roi_size == 96
    assert strategy_named("sub-volumes", volume, Downsampled()).roi_size == 96
    assert type(strategy_named("downsampled", volume, own)) is Downsampled
    assert type(strategy_named("slices", flat, own)) is Slices
    slices = Slices((0, 1, 2))
    assert strategy_named("slices", flat, slices) is slices


@pytest.mark.parametrize(
    ("name", "network", "reason"),
    [
        ("windows", nn.Conv3d(1, 2, 1), "must be one of sub-volumes, slices, downsampled, got 'windows'"),
        ("slices", nn.Conv3d(1, 2, 1), "does not suit a network of 3D convolutions: take sub-volumes or downsampled"),
        ("sub-volumes", nn.Conv2d(1, 2, 1), "does not suit a network of 2D convolutions: take slices"),
        ("downsampled", nn.Conv2d(1, 2, 1), "does not suit a network of 2D convolutions: take slices"),
    ],
)
def test_strategies_that_cannot_be(name, network, reason):
    with pytest.raises(ValueError, match=reason):
        strategy_named(name, network, None)

"""Preprocessing and its way back: grids, label maps, left and right."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Invertd
from scipy import ndimage

from medseg3d.data.transforms import (
    AxesLiked,
    LabelsOnInputGridd,
    ModelGrid,
    RandFieldOfViewd,
    RandMirrorLateralityd,
    ToModelGridd,
    applied_frame,
    body_box,
    labels_by_interpolation,
    swap_labels,
)
from medseg3d.geometry import Chain, Geometry

ORIENTATIONS = ["".join(codes) for axes in permutations(("RL", "AP", "SI")) for codes in product(*axes)]


SPACING = (2.0, 1.5, 3.0)


def oblique():
    """The affine of a grid of `SPACING`, 12 degrees off the anatomical axes, RAS."""
    a, b = np.radians([12.0, -7.0])
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = about_z @ about_x * SPACING
    affine[:3, 3] = (-31.0, 12.5, 104.0)
    return affine


def smooth(shape, seed=0):
    """A smooth image in HU, about -1000 at the border and up to 1000 inside."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 1.2)
    inside = np.pad(np.ones([n - 4 for n in shape]), 2)
    return (ndimage.gaussian_filter(inside, 0.7) * (1000 + 500 * noise / noise.std()) - 1000).astype(np.float32)


def blobs(shape, numbers, seed=1):
    """A label map of thick regions, 0 and each of `numbers`."""
    fields = np.random.default_rng(seed).standard_normal((len(numbers) + 1, *shape))
    winners = ndimage.gaussian_filter(fields, (0, 2.5, 2.5, 2.5)).argmax(axis=0)
    return np.array([0, *numbers])[winners].astype(np.uint16)


def tensor(array, affine):
    return MetaTensor(torch.from_numpy(np.array(array, dtype=array.dtype)[None]), affine=torch.tensor(affine))


def plain_argmax(frame, one_hot):
    return frame.image(one_hot).argmax(axis=0)


class TestGrid:
    def test_body_box(self):
        array = np.full((6, 7, 8), -1000.0)
        array[2:4, 1, 3:8] = 40
        start, stop = body_box(array, -500)
        assert start.tolist() == [2, 1, 3] and stop.tolist() == [4, 2, 8]
        start, stop = body_box(array, 100)
        assert start.tolist() == [0, 0, 0] and stop.tolist() == [6, 7, 8]

    def test_orientation_spacing_and_margin(self):
        array = np.full((20, 18, 16), -1000.0)
        array[6:14, 5:12, 4:10] = 40
        affine = np.diag([-2.0, -1.0, 3.0, 1.0])
        frame = ModelGrid("RAS", (1.0, 1.0, 1.5), crop_above=-500, crop_margin=3.0).frame(array, affine)
        assert frame.target.orientation == "RAS"
        np.testing.assert_allclose(frame.target.spacing, (1.0, 1.0, 1.5))
        assert frame.target.shape == ((8 + 4) * 2, 7 + 6, (6 + 2) * 2)  # 3 mm are 2, 3 and 1 voxels at each end
        first, last = frame.source.world([(6, 5, 4), (13, 11, 9)])
        inside = frame.target.index([first, last])
        assert (inside > 1).all() and (inside < np.array(frame.target.shape) - 2).all()

    def test_the_margin_ends_with_the_volume(self):
        frame = ModelGrid("RAS", (2.0, 2.0, 2.0), crop_above=0, crop_margin=100).frame(
            np.ones((4, 5, 6)), np.diag([2.0, 2.0, 2.0, 1.0])
        )
        assert frame.target.shape == (4, 5, 6)


class TestLabelsByInterpolation:
    def frames(self):
        grid = Geometry((24, 20, 18), oblique())
        yield grid.resample(spacing=1.3)
        yield grid.resample(spacing=4.1)
        yield grid.reorient("PIR")
        chain = ModelGrid("LSA", (2.5, 1.1, 2.2), crop_above=-300).frame(smooth(grid.shape), grid.affine)
        yield chain
        yield chain.inverse()
        turned = grid.resample(spacing=2.6).target.reorient("SAR")
        yield Chain([grid.resample(spacing=2.6), turned, turned.target.resample(spacing=1.9)])

    def test_equal_to_the_argmax_of_the_interpolated_one_hot(self):
        for frame in self.frames():
            labels = blobs(frame.source.shape, [1, 2, 3])
            one_hot = np.stack([labels == n for n in range(4)])
            ours = labels_by_interpolation(frame, one_hot)
            assert ours.shape == frame.target.shape and ours.dtype == np.uint8
            np.testing.assert_array_equal(ours, plain_argmax(frame, one_hot.astype(np.float32)))
            assert len(np.unique(ours)) == 4

    def test_logits_outside_the_source_are_background(self):
        """Padding fills with 0, which must not beat a background logit of -5 there."""
        crop = Geometry((9, 8, 7), np.eye(4)).crop((2, 2, 2), (7, 6, 5))
        frame = Chain([crop, crop.target.resample(shape=(10, 8, 6))]).inverse()
        logits = np.stack([np.full(frame.source.shape, -5.0), np.full(frame.source.shape, -1.0)])
        expected = np.zeros((9, 8, 7), np.uint8)
        expected[2:7, 2:6, 2:5] = 1
        np.testing.assert_array_equal(labels_by_interpolation(frame, logits), expected)

    def test_ties_go_to_the_lower_class(self):
        frame = Geometry((4, 4, 4), np.eye(4)).resample(spacing=0.5)
        assert (labels_by_interpolation(frame, np.ones((3, 4, 4, 4))) == 0).all()

    @pytest.mark.parametrize(("classes", "dtype"), [(256, np.uint8), (257, np.uint16)])
    def test_as_many_bits_as_the_classes_need(self, classes, dtype):
        frame = Geometry((2, 2, 2), np.eye(4)).resample(shape=(4, 4, 4))
        logits = np.zeros((classes, 2, 2, 2), np.float32)
        logits[-1] = 1
        labels = labels_by_interpolation(frame, logits)
        assert labels.dtype == dtype and (labels == classes - 1).all()

    def test_the_channels_are_not_changed(self):
        logits = np.random.default_rng(0).standard_normal((3, 5, 6, 7)).astype(np.float32)
        for frame in (
            Geometry((5, 6, 7), np.eye(4)).reorient("LPS"),
            Geometry((5, 6, 7), np.eye(4)).resample(shape=(5, 6, 7)),
        ):
            before = logits.copy()
            labels_by_interpolation(frame, logits)
            np.testing.assert_array_equal(logits, before)


class TestToModelGrid:
    shape = (22, 26, 18)

    def data(self, orientation="LPS", numbers=(1, 2, 7)):
        reorient = Geometry(self.shape, oblique()).reorient(orientation)
        image, label = (reorient.image(array) for array in (smooth(self.shape), blobs(self.shape, numbers)))
        return {"image": tensor(image, reorient.target.affine), "label": tensor(label, reorient.target.affine)}

    def test_image_and_labels_arrive_on_one_grid(self):
        data = self.data()
        moved = ToModelGridd(("image", "label"), "label", "RAS", (2.5, 2.5, 2.5), crop_above=-500, crop_margin=5)(data)
        frame = applied_frame(moved["image"])
        assert moved["image"].shape == moved["label"].shape == (1, *frame.target.shape)
        for key in ("image", "label"):
            np.testing.assert_array_equal(moved[key].affine, frame.target.affine)
            assert Geometry(frame.target.shape, moved[key].affine.numpy()).orientation == "RAS"
        assert moved["image"].dtype == torch.float32 and torch.isfinite(moved["image"]).all()
        assert moved["label"].dtype == torch.uint8 and set(moved["label"].unique().tolist()) == {0, 1, 2, 7}

    def test_a_grid_that_fits_already_gives_memory_of_its_own(self):
        data = self.data("RAS")
        moved = ToModelGridd(("image", "label"), "label", "RAS", SPACING)(data)
        for key in ("image", "label"):
            np.testing.assert_array_equal(moved[key].numpy(), data[key].numpy())
            assert moved[key].data_ptr() != data[key].data_ptr()

    def test_without_upsampling_coarser_axes_stay_and_the_spacing_is_told(self):
        data = self.data("RAS")
        wanted = [SPACING[0] / 2, SPACING[1], SPACING[2] * 2]
        transform = ToModelGridd(("image", "label"), "label", spacing=wanted, upsample=False, spacing_key="mm")
        moved = transform(data)
        torch.testing.assert_close(moved["mm"], torch.tensor([*SPACING[:2], wanted[2]]))
        assert moved["image"].shape == moved["label"].shape == (1, *self.shape[:2], self.shape[2] // 2)

    def test_the_caller_keeps_its_data(self):
        data = self.data()
        before = {key: (value.numpy().copy(), value.affine.numpy().copy()) for key, value in data.items()}
        ToModelGridd(("image", "label"), "label", spacing=(3, 3, 3))(data)
        for key, (array, affine) in before.items():
            np.testing.assert_array_equal(data[key].numpy(), array)
            np.testing.assert_array_equal(data[key].affine.numpy(), affine)
            assert data[key].applied_operations == []

    def test_label_numbers_above_255_are_kept(self):
        moved = ToModelGridd(("image", "label"), "label", spacing=(2.5, 2.5, 2.5))(self.data(numbers=(1, 300)))
        assert moved["label"].dtype == torch.uint16
        assert set(np.unique(moved["label"].numpy())) == {0, 1, 300}

    def test_labels_follow_the_image_in_space(self):
        """Where the image is its own label map, both ways through the transform agree."""
        data = self.data(numbers=(1,))
        data["image"] = tensor(data["label"][0].numpy().astype(np.float32), data["label"].affine.numpy())
        moved = ToModelGridd(("image", "label"), "label", spacing=(1.7, 1.7, 1.7))(data)
        same = (moved["image"].numpy() > 0.5) == (moved["label"].numpy() == 1)
        assert same.mean() > 0.999  # the order of sums may turn a tie

    def test_inverting_a_change_of_axes_and_a_crop_is_exact(self):
        data = self.data("PSL")
        transform = ToModelGridd(("image", "label"), "label", "RAS", SPACING, crop_above=-500)
        back = Compose([transform, Invertd(("image", "label"), transform)])(data)
        np.testing.assert_array_equal(back["label"].affine, data["label"].affine)
        frame = applied_frame(transform(data)["image"])
        kept = frame.inverse().label_map(np.ones(frame.target.shape, np.uint8))
        assert 0 < kept.sum() < kept.size
        np.testing.assert_array_equal(back["label"][0].numpy(), data["label"][0].numpy() * kept)
        np.testing.assert_array_equal(back["image"][0].numpy(), data["image"][0].numpy() * kept)

    def test_inverting_restores_labels_and_grid(self):
        data = self.data("SRA")
        thirds = np.divide(SPACING, 3)  # so that a new voxel's centre is on every old one
        transform = ToModelGridd(("image", "label"), "label", "LPI", thirds)
        back = Compose([transform, Invertd("label", transform, orig_keys="image")])(data)
        assert back["label"].shape == data["label"].shape
        np.testing.assert_allclose(back["label"].affine, data["label"].affine)
        np.testing.assert_array_equal(back["label"].numpy(), data["label"].numpy())
        assert back["label"].applied_operations == []

    def test_inverting_a_prediction_by_the_record_of_its_image(self):
        data = self.data()
        transform = ToModelGridd("image", spacing=(3, 3, 3))
        moved = transform(data)
        moved["pred"] = MetaTensor(torch.ones(1, *moved["image"].shape[1:]))
        back = Invertd("pred", transform, orig_keys="image")(moved)["pred"]
        assert back.shape == data["image"].shape and (back == 1).all()

    @pytest.mark.parametrize(("number", "message"), [(0.996, "fractions such as 0.996"), (-1, "below 0 such as -1")])
    def test_what_is_no_label_map_is_refused(self, number, message):
        """Such as a file that was written with a scale factor: its labels would be lost."""
        data = self.data()
        data["label"] = tensor(np.where(blobs(self.shape, (1, 2)) == 1, number, 0).astype(np.float32), oblique())
        data["image"] = tensor(smooth(self.shape), oblique())
        with pytest.raises(ValueError, match=f"'label' is no label map: it holds .*{message}"):
            ToModelGridd(("image", "label"), "label")(data)
        with pytest.raises(ValueError, match=message):
            AxesLiked("label")(data)
        data["label"] = tensor(blobs(self.shape, (1, 2)) + np.float32(1e-5), oblique())
        moved = ToModelGridd(("image", "label"), "label", spacing=(2, 2, 2))(data)
        assert set(moved["label"].unique().tolist()) == {0, 1, 2}

    def test_another_grid_is_refused(self):
        data = self.data()
        data["label"].affine[0, 3] += 5
        with pytest.raises(ValueError, match=r"'label' does not lie on the grid of 'image': .* resample it"):
            ToModelGridd(("image", "label"), "label")(data)

    def test_what_rounding_explains_is_one_grid(self):
        """As `medseg3d check` has it: in voxels, not in mm."""
        data = self.data()
        data["label"].affine[0, 3] += min(SPACING) * 0.04
        ToModelGridd(("image", "label"), "label")(data)
        data["label"].affine[0, 3] += min(SPACING) * 0.04
        with pytest.raises(ValueError, match="does not lie on the grid"):
            ToModelGridd(("image", "label"), "label")(data)

    def test_axes_as_those_of_the_image(self):
        data, turned = self.data("LPS"), self.data("SAR")
        got = AxesLiked("label")({"image": data["image"], "label": turned["label"]})
        np.testing.assert_array_equal(got["label"].numpy(), data["label"].numpy())
        np.testing.assert_allclose(got["label"].affine, data["label"].affine, atol=1e-9)
        turned["label"].affine[0, 3] += 5
        with pytest.raises(ValueError, match="'label' does not lie on the grid of 'image'"):
            AxesLiked("label")({"image": data["image"], "label": turned["label"]})

    def test_an_image_without_a_record_is_refused(self):
        with pytest.raises(ValueError, match="no record of ToModelGridd: put it into the preprocessing"):
            applied_frame(self.data()["image"])


SCAN_SHAPE = (16, 20, 14)


def segment(image, affine):
    """Preprocess, a "network" that tells three ranges of HU apart, and back: the label map and its affine."""
    to_grid = ToModelGridd("image", (), "RAS", (2.2, 2.2, 2.2), crop_above=-500, crop_margin=4)
    data = to_grid({"image": tensor(image, affine)})
    x = data["image"].as_tensor()[0] / 100
    data["pred"] = torch.stack([torch.zeros_like(x), 1 - (x + 2).abs(), x - 1.5])
    labels = LabelsOnInputGridd("pred", "image")(data)["pred"]
    return labels[0].numpy(), labels.affine.numpy()


@pytest.fixture(scope="module")
def expected():
    labels, _ = segment(smooth(SCAN_SHAPE), oblique())
    assert np.bincount(labels.ravel()).min() > 100  # three classes, each of some size
    return labels


class TestLabelsOnInputGrid:
    def test_there_are_48_orientations(self):
        assert len(set(ORIENTATIONS)) == 48

    @pytest.mark.parametrize("codes", ORIENTATIONS)
    def test_the_same_segmentation_in_space_from_every_orientation(self, codes, expected):
        reorient = Geometry(SCAN_SHAPE, oblique()).reorient(codes)
        labels, affine = segment(reorient.image(smooth(SCAN_SHAPE)), reorient.target.affine)
        np.testing.assert_array_equal(affine, reorient.target.affine)
        assert labels.shape == reorient.target.shape and labels.dtype == np.uint8
        same = reorient.inverse().label_map(labels) == expected
        assert same.mean() > 0.999  # the order of sums may turn a tie

    def test_many_predictions_of_one_image(self):
        data = ToModelGridd("image", spacing=(3, 3, 3))({"image": tensor(smooth(SCAN_SHAPE), oblique())})
        size = data["image"].shape[1:]
        data["a"] = torch.stack([torch.zeros(size), torch.ones(size)])
        data["b"] = torch.stack([torch.ones(size), torch.zeros(size)]).to(torch.bfloat16)
        back = LabelsOnInputGridd(("a", "b"), "image")(data)
        assert (back["a"] == 1).all() and (back["b"] == 0).all()
        assert back["a"].shape == back["b"].shape == (1, *SCAN_SHAPE)


class TestMirror:
    def data(self):
        image = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).reshape(1, 6, 4, 5)
        label = torch.randint(0, 5, (1, 6, 4, 5), generator=torch.Generator().manual_seed(0))
        return {"image": image, "label": label, "annotated": [1, 1, 0, 1, 0]}

    def test_left_and_right_change_places(self):
        data = self.data()
        mirrored = RandMirrorLateralityd(("image", "label"), "label", pairs=[(3, 4)], prob=1.0)(data)
        assert torch.equal(mirrored["image"], data["image"].flip(1))
        flipped = data["label"].flip(1)
        for before, after in ((0, 0), (1, 1), (2, 2), (3, 4), (4, 3)):
            assert (mirrored["label"][flipped == before] == after).all()
        assert mirrored["annotated"] == [1, 1, 0, 0, 1]

    def test_twice_is_nothing_and_the_input_stays(self):
        data, fresh = self.data(), self.data()
        transform = RandMirrorLateralityd(("image", "label"), "label", pairs=[(3, 4)], prob=1.0)
        twice = transform(transform(data))
        for key in ("image", "label"):
            assert torch.equal(twice[key], fresh[key]) and torch.equal(data[key], fresh[key])
        assert twice["annotated"] == data["annotated"] == fresh["annotated"]

    def test_probability_and_seed(self):
        never = RandMirrorLateralityd("image", prob=0.0)
        assert all(torch.equal(never(self.data())["image"], self.data()["image"]) for _ in range(20))

        def draws(seed):
            transform = RandMirrorLateralityd("image", prob=0.5)
            transform.set_random_state(seed)
            return [not torch.equal(transform(self.data())["image"], self.data()["image"]) for _ in range(60)]

        assert draws(1) == draws(1) != draws(2)
        assert 15 < sum(draws(1)) < 45

    def test_the_right_side_is_the_first_axis_of_a_model_grid(self):
        """In "RAS" the first axis runs from left to right, so that is the one to mirror."""
        frame = ModelGrid("RAS", (2, 2, 2)).frame(np.zeros((6, 7, 8)), np.diag([-2.0, -2.0, 2.0, 1.0]))
        assert frame.target.world((1, 0, 0))[0] > frame.target.world((0, 0, 0))[0]

    def test_swap_labels_changes_pairs_at_once(self):
        swapped = swap_labels(torch.tensor([0, 1, 2, 3, 4, 5]), [(1, 2), (4, 5)])
        assert swapped.tolist() == [0, 2, 1, 3, 5, 4]


class TestRandFieldOfView:
    def data(self):
        image = torch.full((1, 20, 16, 12), 5.0)
        return {"image": image, "label": torch.ones(1, 20, 16, 12)}

    def test_air_and_background_around_one_box(self):
        transform = RandFieldOfViewd(("image", "label"), "label", fill=-3.0, min_share=0.5, prob=1.0)
        transform.set_random_state(seed=1)
        sizes = set()
        for _ in range(20):
            result = transform(self.data())
            inside = result["image"][0] == 5.0
            start, stop = body_box(inside.numpy().astype(float), 0.5)
            box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
            assert inside[box].all() and inside.sum() == inside[box].numel()
            assert (result["image"][0][~inside] == -3.0).all()
            assert torch.equal(result["label"][0] == 1, inside)
            assert all(n >= full / 2 for n, full in zip(stop - start, (20, 16, 12), strict=True))
            sizes.add(tuple(stop - start))
        assert len(sizes) > 10

    def test_never_with_probability_zero_and_the_caller_keeps_his(self):
        data = self.data()
        assert RandFieldOfViewd(("image", "label"), "label", prob=0.0)(data)["image"] is data["image"]
        RandFieldOfViewd(("image", "label"), "label", prob=1.0)(data)
        assert (data["image"] == 5.0).all()

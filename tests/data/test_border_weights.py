"""U-Net's weights of borders and classes: stored values, the definition, and what separates touching objects."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from medseg3d.data.border_weights import BorderWeightsd, balanced_weights, border_weights, part_touching


@pytest.mark.parametrize("name", ["cells", "touching", "single", "empty"])
def test_stored_border_weights(name, shared):
    stored = np.load(shared("golden", "2d", "equations") / "unet.npz")
    objects = stored[f"{name}_labels"]
    np.testing.assert_allclose(border_weights(objects), stored[f"{name}_border"], rtol=1e-6, atol=1e-7)
    other = border_weights(objects, w0=5, sigma=3)
    np.testing.assert_allclose(other, stored[f"{name}_border_w5_s3"], rtol=1e-6, atol=1e-7)


def test_stored_class_weights(shared):
    stored = np.load(shared("golden", "2d", "equations") / "unet.npz")
    found = balanced_weights((stored["cells_labels"] > 0).astype(int))
    np.testing.assert_allclose(found, stored["cells_class_weights"], rtol=1e-6)


def test_three_axes_with_their_spacing():
    """Against the definition: distances of every voxel to every object in mm."""
    rng = np.random.default_rng(0)
    objects = np.zeros((6, 12, 40), np.int32)
    for number in (1, 2, 5):
        objects[tuple(rng.integers(0, size, 9) for size in objects.shape)] = number
    spacing = (3.0, 1.0, 0.5)
    to_each = [ndimage.distance_transform_edt(objects != number, sampling=spacing) for number in (1, 2, 5)]
    nearest, second, _ = np.sort(to_each, axis=0)
    expected = 10 * np.exp(-((nearest + second) ** 2) / (2 * 2.0**2))
    np.testing.assert_allclose(border_weights(objects, sigma=2.0, spacing=spacing), expected, rtol=1e-5, atol=1e-6)


def test_far_objects_have_no_border():
    objects = np.zeros((4, 400), np.uint8)
    objects[:, :2], objects[:, -2:] = 1, 2
    assert not border_weights(objects).any()


def test_classes_weigh_the_same_together_and_a_missing_one_nothing():
    classes = np.array([[0, 0, 0, 2], [0, 0, 0, 2]])
    weights = balanced_weights(classes, number=3)
    assert weights[classes == 0].sum() == pytest.approx(weights[classes == 2].sum())
    assert np.isfinite(balanced_weights(np.zeros((2, 2), int))).all()


def test_touching_objects_are_parted_and_others_keep_their_voxels():
    objects = np.zeros((5, 7), np.int32)
    objects[1:4, 1:3], objects[1:4, 3:5] = 3, 8
    parted = part_touching(objects)
    assert parted[2].tolist() == [0, 3, 0, 0, 8, 0, 0]
    assert ndimage.label(parted, np.ones((3, 3)))[1] == 2
    apart = np.where(objects == 8, 0, objects)
    np.testing.assert_array_equal(part_touching(apart), apart)
    assert not part_touching(np.zeros((3, 3), int)).any()


def test_an_object_may_have_the_highest_number_of_its_type():
    objects = np.zeros((5, 5), np.uint8)
    objects[1:4, 1:4] = 255
    np.testing.assert_array_equal(part_touching(objects), objects)


def test_the_transform_gives_classes_and_both_terms():
    objects = np.zeros((1, 8, 8), np.uint16)
    objects[0, 2:6, 1:4], objects[0, 2:6, 4:7] = 1, 2
    data = {"label": objects, "name": "a"}
    result = BorderWeightsd("label")(data)
    assert set(np.unique(result["label"])) == {0, 1} and result["name"] == "a"
    np.testing.assert_allclose(
        result["weights"][0], balanced_weights(result["label"][0]) + border_weights(objects[0].astype(int)), rtol=1e-6
    )
    assert data["label"] is objects and objects.max() == 2
    plain = BorderWeightsd("label", "w", w0=2, sigma=1, balance=False)(data)["w"]
    np.testing.assert_allclose(plain[0], 1 + border_weights(objects[0].astype(int), 2, 1), rtol=1e-6)


@pytest.mark.parametrize(
    ("objects", "arguments", "message"),
    [
        (np.zeros((3, 3)), {}, "numbered with integers.*float64"),
        (np.zeros((3, 3), int), {"sigma": 0}, "must be positive, got 10.0 and 0"),
    ],
)
def test_what_is_refused(objects, arguments, message):
    with pytest.raises(ValueError, match=message):
        border_weights(objects, **arguments)

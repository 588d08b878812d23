"""Volume: an array on a grid that never changes in place."""

from __future__ import annotations

import numpy as np
import pytest

from medseg3d.volume import Volume

LPS = np.diag([-1.0, -1, 2.5, 1])
HEADER = {"format": "nifti", "units": "mm", "sform_code": 1, "qform": LPS, "nifti": b"raw", "modality": "CT"}


@pytest.fixture
def ct() -> Volume:
    array = np.random.default_rng(0).integers(-1000, 2000, (4, 5, 6)).astype(np.int16)
    return Volume(array, LPS, HEADER)


def test_what_a_volume_says_of_itself(ct):
    assert ct.shape == (4, 5, 6)
    assert ct.spacing == (1, 1, 2.5)
    assert ct.orientation == "LPS"
    assert ct.dtype == np.int16
    assert ct.geometry.voxel_volume == pytest.approx(2.5)
    assert Volume(ct.array, LPS).header == {}


def test_nothing_can_be_written_through_a_volume():
    array, affine = np.zeros((2, 2, 2)), np.eye(4)
    volume = Volume(array, affine)
    for kept in (volume.array, volume.affine, volume.reoriented("LPS").array, volume.with_array(array).array):
        with pytest.raises(ValueError, match="read-only"):
            kept[0, 0] = 1
    array[0, 0, 0] = affine[0, 3] = 1  # the caller's own arrays stay the caller's
    assert volume.affine[0, 3] == 0
    with pytest.raises(AttributeError):
        volume.array = array


@pytest.mark.parametrize(
    ("array", "affine", "message"),
    [
        (np.zeros((3, 3)), LPS, "three whole numbers"),
        (np.zeros((3, 3, 3, 2)), LPS, "three whole numbers"),
        (np.zeros((3, 3, 3)), np.diag([1.0, 0, 1, 1]), "spacing"),
    ],
)
def test_bad_volumes_are_refused(array, affine, message):
    with pytest.raises(ValueError, match=message):
        Volume(array, affine)


def test_with_array_keeps_grid_and_header(ct):
    labels = ct.with_array(np.ones(ct.shape, np.uint8))
    assert labels.geometry == ct.geometry
    assert labels.header == HEADER
    assert labels.dtype == np.uint8
    with pytest.raises(ValueError, match=r"\(4, 5, 6\), got \(4, 5, 5\)"):
        ct.with_array(np.zeros((4, 5, 5)))


def test_there_and_back(ct):
    ras = ct.reoriented("RAS")
    assert ras.orientation == "RAS"
    np.testing.assert_array_equal(ras.array, ct.array[::-1, ::-1])
    np.testing.assert_array_equal(ras.affine @ [3, 4, 0, 1], [0, 0, 0, 1])
    back = ras.reoriented("LPS")
    np.testing.assert_array_equal(back.array, ct.array)
    assert back.geometry == ct.geometry


def test_the_header_loses_only_what_describes_the_old_grid(ct):
    moved = ct.moved(ct.geometry.resample(2))
    assert moved.header == {"format": "nifti", "units": "mm", "sform_code": 1, "modality": "CT"}
    assert ct.header == HEADER


def test_moved_interpolates_images_and_not_labels(ct):
    frame = ct.geometry.resample(shape=(8, 10, 12))
    image, labels = ct.moved(frame), ct.moved(frame, labels=True)
    assert image.geometry == labels.geometry == frame.target
    assert (image.dtype, labels.dtype) == (np.float32, np.int16)
    np.testing.assert_array_equal(labels.array, ct.array.repeat(2, 0).repeat(2, 1).repeat(2, 2))
    np.testing.assert_array_equal(ct.moved(frame, order=0).array, labels.array)
    assert not np.array_equal(ct.moved(frame, order=3).array, image.array)


def test_fill(ct):
    frame = ct.geometry.pad((1, 0, 0), (0, 0, 0))
    assert (ct.moved(frame).array[0] == ct.array.min()).all()
    assert (ct.moved(frame, fill=-3).array[0] == -3).all()
    assert (ct.moved(frame, labels=True).array[0] == 0).all()
    assert (ct.moved(frame, labels=True, fill=9).array[0] == 9).all()


def test_a_frame_of_another_grid_is_refused(ct):
    with pytest.raises(ValueError, match="another grid"):
        ct.moved(ct.reoriented("RAS").geometry.reorient("LPS"))

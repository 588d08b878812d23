"""MONAI's LoadImaged with medseg3d's own reader."""

from __future__ import annotations

import numpy as np
import pytest
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged

from medseg3d.data.readers import VolumeReader
from medseg3d.io import read_volume, write_volume
from medseg3d.volume import Volume

AFFINE = np.array([[0, -2.0, 0, 10], [1.5, 0, 0, -20], [0, 0, 3, 5], [0, 0, 0, 1]])


@pytest.fixture
def load():
    return Compose([LoadImaged("image", reader=VolumeReader()), EnsureChannelFirstd("image")])


def scan(value=0):
    return Volume(np.arange(60, dtype=np.int16).reshape(3, 4, 5) + np.int16(value), AFFINE)


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
def test_every_format_lies_where_predict_has_it(suffix, load, tmp_path):
    path = write_volume(scan(), tmp_path / f"a{suffix}")
    image, expected = load({"image": str(path)})["image"], read_volume(path)
    np.testing.assert_array_equal(image[0], expected.array)
    np.testing.assert_allclose(image.affine, expected.affine)
    assert image.meta["filename_or_obj"] == str(path)


def test_a_file_for_each_channel(load, tmp_path):
    files = [str(write_volume(scan(n), tmp_path / f"{n}.nii.gz")) for n in range(2)]
    image = load({"image": files})["image"]
    assert image.shape == (2, 3, 4, 5) and (image[1] - image[0] == 1).all()
    away = write_volume(Volume(scan().array, AFFINE @ np.diag([1, 1, 2.0, 1])), tmp_path / "away.nii.gz")
    with pytest.raises(RuntimeError, match="LoadImaged") as error:
        load({"image": [files[0], str(away)]})
    assert "the channels of a case must lie on one grid" in str(error.value.__cause__)


def test_a_tilted_series_is_that_of_predict(load, shared):
    folder = shared("data", "ge-head-tilt-dicom")
    image, expected = load({"image": str(folder)})["image"], read_volume(folder)
    assert image.shape[1:] == expected.shape
    np.testing.assert_allclose(image.affine, expected.affine)

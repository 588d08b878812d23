"""Pictures for networks: rows stay rows, grey has three channels, contrast is the picture's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from medseg3d.data.pictures import (
    LoadPictured,
    ObjectTargetsd,
    StretchContrastd,
)
from medseg3d.io.raster import write_image, write_label_image

RNG = np.random.default_rng(0)


def test_pictures_are_loaded_as_they_lie(tmp_path):
    grey, colors = RNG.integers(0, 65536, (4, 7)).astype(np.uint16), RNG.integers(0, 256, (5, 3, 3)).astype(np.uint8)
    labels = RNG.integers(0, 900, (4, 7))
    paths = {
        "grey": write_image(tmp_path / "grey.png", grey),
        "colors": write_image(tmp_path / "colors.tif", colors),
        "label": write_label_image(tmp_path / "label.png", labels),
    }
    data = {**{name: str(path) for name, path in paths.items()}, "case": "a"}
    loaded = LoadPictured(["grey", "colors", "label"], label_keys="label")(data)
    np.testing.assert_array_equal(loaded["grey"], np.stack([grey.astype(np.float32)] * 3))
    np.testing.assert_array_equal(loaded["colors"], np.moveaxis(colors, -1, 0).astype(np.float32))
    np.testing.assert_array_equal(loaded["label"], labels[None])
    assert loaded["label"].dtype == torch.int32 and loaded["grey"].dtype == torch.float32
    assert loaded["grey"].meta["filename_or_obj"] == data["grey"] and loaded["case"] == "a"


def test_contrast_is_stretched_between_percentiles_and_cut_off():
    image = torch.arange(1000.0).view(1, 20, 50)
    stretched = StretchContrastd("image", 10, 90)({"image": image})["image"]
    assert stretched.min() == 0 and stretched.max() == 1
    middle = stretched[(stretched > 0) & (stretched < 1)]
    torch.testing.assert_close(middle, (image[(image > 99.9) & (image < 899.1)] - 99.9) / 799.2)
    assert image.max() == 999


def test_a_brighter_or_deeper_picture_is_the_same():
    image = torch.from_numpy(RNG.integers(0, 200, (3, 30, 30)).astype(np.float32))
    stretch = StretchContrastd("image")
    torch.testing.assert_close(stretch({"image": image})["image"], stretch({"image": image * 257 + 12})["image"])


def test_a_picture_of_one_value():
    assert not StretchContrastd("image")({"image": torch.full((3, 4, 4), 7.0)})["image"].any()


@pytest.mark.parametrize("percentiles", [(5, 5), (-1, 50), (50, 101)])
def test_percentiles_out_of_order(percentiles):
    with pytest.raises(ValueError, match="percentiles must be 0 <= lower < upper <= 100"):
        StretchContrastd("image", *percentiles)


def test_targets_of_numbered_objects():
    objects = torch.zeros(1, 6, 8, dtype=torch.int32)
    objects[0, 1:3, 2:7], objects[0, 5, 0], objects[0, 4:6, 6:8] = 9, 3, 4
    found = ObjectTargetsd("label", least=2)({"label": objects})
    assert found["boxes"].tolist() == [[6, 4, 8, 6], [2, 1, 7, 3]]
    assert found["labels"].tolist() == [1, 1]
    assert (found["masks"][1].bool() == (objects[0] == 9)).all() and found["masks"].dtype == torch.uint8


def test_no_objects_are_targets_too():
    found = ObjectTargetsd("label")({"label": torch.zeros(1, 4, 5)})
    assert found["boxes"].shape == (0, 4) and found["masks"].shape == (0, 4, 5) and found["labels"].dtype == torch.int64

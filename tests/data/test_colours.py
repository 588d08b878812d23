"""Colours under random maps, and pictures sampled by their kind."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from medseg3d.data.colours import RandColoursd, even_weights, kind_of_picture
from medseg3d.io.raster import write_image, write_label_image

RNG = np.random.default_rng(0)


def colours(image, seed=0, **probabilities):
    none = dict.fromkeys(("invert", "permute", "grey", "tint"), 0.0)
    return RandColoursd("image", **none | probabilities).set_random_state(seed)({"image": image})["image"]


def test_each_change_of_colours_is_what_it_says():
    image = torch.from_numpy(RNG.random((3, 5, 6)).astype(np.float32))
    before = image.clone()
    assert torch.equal(colours(image), image)
    torch.testing.assert_close(colours(image, invert=1.0), 1 - image)
    permuted = colours(image, seed=1, permute=1.0)
    assert not torch.equal(permuted, image) and torch.equal(permuted.sort(0).values, image.sort(0).values)
    grey = colours(image, grey=1.0)
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[0], grey[2])
    assert (grey[0] >= image.amin(0)).all() and (grey[0] <= image.amax(0)).all() and (grey[0] != image).all()
    assert torch.equal(image, before) and grey.dtype == torch.float32


def test_colours_change_where_the_picture_lies():
    assert colours(torch.rand(3, 4, 4, device="meta"), invert=1.0, tint=1.0).is_meta


def test_tints_give_a_grey_picture_colours_and_each_channel_its_range():
    ramp = torch.linspace(0, 1, 12).expand(3, 4, 12)
    spans = []
    for seed in range(50):
        tinted = colours(ramp, seed, tint=1.0, least_range=0.3)
        assert tinted.min() >= 0 and tinted.max() <= 1 and not torch.allclose(tinted[0], tinted[1])
        spans += (tinted[:, 0, -1] - tinted[:, 0, 0]).tolist()
        mirrored = colours(ramp, seed, tint=1.0, invert=1.0)
        assert (mirrored[:, :, 0] > mirrored[:, :, -1]).all() and mirrored.min() >= 0 and mirrored.max() <= 1
    assert 0.3 <= min(spans) < 0.35 and 0.95 < max(spans) <= 1


def test_changes_of_colours_are_as_frequent_as_asked():
    image = torch.rand(3, 2, 2)
    transform = RandColoursd("image", invert=0.3, permute=0, grey=0, tint=0).set_random_state(0)
    share = np.mean([bool((transform({"image": image})["image"] != image).any()) for _ in range(1000)])
    assert 0.25 < share < 0.35


def test_colours_need_three_channels_and_a_range():
    with pytest.raises(ValueError, match="three channels"):
        colours(torch.zeros(1, 4, 4))
    with pytest.raises(ValueError, match="least_range"):
        RandColoursd("image", least_range=1.5)


def test_the_kind_of_a_picture(tmp_path):
    def case(image, radius):
        rows, columns = np.indices((64, 64))
        objects = ((rows - 32) ** 2 + (columns - 32) ** 2 < radius**2).astype(int)
        write_image(tmp_path / "image.png", image)
        write_label_image(tmp_path / "label.png", objects)
        return {"image": tmp_path / "image.png", "label": tmp_path / "label.png"}

    grey = np.full((64, 64), 90, np.uint8)
    pink = np.stack([grey + 60, grey, grey], axis=-1)
    assert kind_of_picture(case(pink, 20)) == "stained"
    assert kind_of_picture(case(np.stack([grey] * 3, axis=-1), 20)) == "large nuclei"
    assert kind_of_picture(case(grey, 12)) == "small nuclei" and kind_of_picture(case(grey, 0)) == "small nuclei"
    assert kind_of_picture(case(grey, 12), large=20) == "large nuclei"


def test_every_kind_comes_up_equally_often():
    assert even_weights(["a", "b", "a", "a", "c", "b"]) == pytest.approx([1 / 9, 1 / 6, 1 / 9, 1 / 9, 1 / 3, 1 / 6])
    assert even_weights([]) == []

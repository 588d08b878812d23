"""What a network that unifies stuff and things returns, as a value and through the command."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from medseg3d.data.results import SaveResultd, as_result, named
from medseg3d.io import read_label_table, read_panoptic
from medseg3d.networks import UPSNet
from medseg3d.networks.backbones.fpn import resnet_fpn_backbone
from tests import tiny_pictures as tiny

NAMES = {0: "glass", 1: "slime", 2: "cell"}
CATEGORIES = named({str(number): name for number, name in NAMES.items()}, stuff=[0, 1])
VOID = 255


class Unified(tiny.Bright):
    """The discs of a picture on glass as UPSNet tells of them, the last column void; the larger the surer."""

    def forward(self, images: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        found = []
        for logits in super().forward(images):
            instance = torch.from_numpy(tiny.numbered()) * (logits.argmax(0) == 1)
            category = torch.where(instance > 0, 2, 0)
            category[:, -1] = VOID
            scores = torch.bincount(instance.flatten())[1:] / 400
            found.append({"category": category, "instance": instance, "scores": scores})
        return found


def check(found):
    assert found.categories == CATEGORIES and not found.is_thing(1)
    assert [segment.category for segment in found.segments.values()] == [0, 2, 2, 2]
    sizes = np.bincount(tiny.numbered().ravel())[1:]
    np.testing.assert_allclose([segment.score for segment in found.segments.values()], [1, *(sizes / 400)], rtol=1e-6)
    expected = np.where(tiny.inside(), tiny.numbered() + 1, 1)
    expected[:, -1] = 0
    np.testing.assert_array_equal(found.ids, expected)


def test_a_network_of_stuff_and_things():
    network = Unified()
    network.load_state_dict(Unified.weights())
    image = torch.from_numpy(tiny.picture() / 255).float().expand(1, 3, -1, -1)
    (found,) = network(image)
    check(as_result(found, "panoptic", CATEGORIES))
    with pytest.raises(ValueError, match="a panoptic detection has category, instance, scores; this one lacks scores"):
        as_result({name: found[name] for name in ("category", "instance")}, "panoptic", CATEGORIES)


def test_upsnet():
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone("resnet18", lambda c: nn.GroupNorm(8, c), 5, out_channels=16, global_pool=True)
    heads = {"box_features": 16, "mask_channels": 8, "anchor_sizes": ((8,), (16,), (32,), (64,), (128,))}
    network = UPSNet(2, 1, backbone, (16, 8), scale=1.0, least_stuff=0, box_score_thresh=0.3, **heads).eval()
    with torch.no_grad():  # masks are full, and things everywhere
        network.semantic_head.score.bias[2] = network.detector.roi_heads.mask_predictor.mask_fcn_logits.bias[1] = 9.0
        (found,) = network([torch.rand(3, 64, 80)])
    value = as_result(found, "panoptic", CATEGORIES)
    things = {number: segment for number, segment in value.segments.items() if value.is_thing(number)}
    seen = found["instance"].unique()
    assert len(things) == int((seen > 0).sum()) > 0
    assert all(0.3 < segment.score < 1 for segment in things.values())
    np.testing.assert_array_equal(value.ids > 0, found["category"] != VOID)


def test_the_command_writes_cocos_panoptic_files(run, tmp_path):
    saver = {"_target_": "medseg3d.data.results.SaveResultd", "keys": "pred", "output_dir": "@output_dir"}
    saver |= {"kind": "panoptic", "categories": {str(n): name for n, name in NAMES.items()}, "stuff": [0, 1]}
    changes = {
        "network_def": {"_target_": "tests.data.test_results.Unified"},
        "inferer": {"_target_": "SimpleInferer"},
        "postprocessing": {"_target_": "Compose", "transforms": [saver]},
    }
    folder = tiny.write_picture_bundle(
        tmp_path / "cells_unified", "panoptic", names=tuple(NAMES.values()), stuff=(0, 1), **changes
    )
    picture = tiny.write_picture(tmp_path / "cells.png")
    target = tmp_path / "out" / "cells_seg.png"
    code, _, errors = run("predict", "-i", picture, "-o", target, "-m", folder, "--trust", "-d", "cpu", "-p", "-s")
    assert (code, errors) == (0, []), errors
    check(read_panoptic(target.with_suffix(".json"), target.parent).panoptic(1))


def test_detections_without_a_pixel_are_left_out():
    masks = torch.zeros(3, 1, 5, 6)
    masks[0, 0, 1:3, 2:4], masks[2, 0, 4, 5] = 0.9, 0.51
    found = {"boxes": torch.arange(12.0).reshape(3, 4), "labels": torch.ones(3).long(), "masks": masks}
    result = as_result({**found, "scores": torch.tensor([0.9, 0.8, 0.7])}, "instances", named({"1": "cell"}))
    assert result.areas.tolist() == [4, 1] and result.boxes[1].tolist() == [8, 9, 10, 11]
    np.testing.assert_allclose(result.scores, [0.9, 0.7], rtol=1e-6)
    none = {name: value[:0] for name, value in found.items()} | {"scores": torch.zeros(0)}
    assert len(as_result(none, "instances", named({"1": "cell"}))) == 0


def test_names_of_classes_go_beside_a_semantic_map(tmp_path):
    """As ``predict`` writes them; by them ``evaluate`` tells classes from numbered objects."""
    from monai.data import MetaTensor

    saver = SaveResultd("pred", tmp_path, "semantic", {"0": "background", "1": "cell", "2": "vessel"})
    image = MetaTensor(torch.zeros(1, 4, 5), meta={"filename_or_obj": "slides/a.png"})
    saver({"image": image, "pred": torch.ones(1, 4, 5, dtype=torch.uint8)})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a_seg.labels.json", "a_seg.png"]
    assert read_label_table(tmp_path / "a_seg.png").names == {1: "cell", 2: "vessel"}

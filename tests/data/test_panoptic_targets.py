"""From numbered objects to what UPSNet learns, and that UPSNet takes it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from medseg3d.data.pictures import UNKNOWN, ObjectTargetsd, PanopticTargetsd
from medseg3d.networks import UPSNet
from medseg3d.networks.backbones.fpn import resnet_fpn_backbone
from medseg3d.networks.detection.panoptic_head import VOID
from medseg3d.training import DetectionIteration


def case(ground=0.1, size=(64, 80)):
    """A block, a column one pixel wide and a single pixel, on ground of one brightness in three unlike channels."""
    objects = torch.zeros(1, *size, dtype=torch.int32)
    objects[0, 8:28, 10:40], objects[0, 40:60, 50], objects[0, 5, 70] = 4, 9, 2
    image = torch.tensor([0.5, 1.0, 1.5])[:, None, None] * torch.full((3, *size), ground)
    image[:, objects[0] > 0] = 1.0
    return {"image": image, "label": objects}


@pytest.mark.parametrize(("ground", "stuff"), [(0.1, 0), (0.39, 0), (0.41, 1), (0.6, 1), (0.9, 2)])
def test_the_ground_is_stuff_by_its_brightness_and_objects_come_after(ground, stuff):
    found = PanopticTargetsd("label", bounds=(0.4, 0.8))(case(ground))
    objects = found["label"][0]
    assert (found["semantic"][objects == 0] == stuff).all() and (found["semantic"][objects > 0] == 3).all()
    assert found["semantic"].dtype == torch.int64 and found["semantic"].shape == (64, 80)


def test_objects_are_those_of_a_detector_with_boxes_up_to_the_last_pixel():
    data = case()
    before = data["label"].clone()
    found, detector = PanopticTargetsd("label")(data), ObjectTargetsd("label")(data)
    assert found["boxes"].tolist() == [[70, 5, 70, 5], [10, 8, 39, 27], [50, 40, 50, 59]]
    assert torch.equal(found["masks"], detector["masks"]) and torch.equal(found["labels"], detector["labels"])
    assert set(data) == {"image", "label"} and torch.equal(data["label"], before)


def test_what_is_too_small_to_be_learnt_is_unknown():
    found = PanopticTargetsd("label", least=2)(case())
    assert len(found["boxes"]) == 2 and UNKNOWN == VOID
    assert (found["semantic"] == UNKNOWN).nonzero().tolist() == [[5, 70]]


@pytest.mark.parametrize(("number", "classes"), [(0, [0]), (1, [2])])
def test_a_crop_of_nothing_but_ground_or_one_object(number, classes):
    found = PanopticTargetsd("label")({"image": torch.zeros(3, 6, 6), "label": torch.full((1, 6, 6), number)})
    assert found["semantic"].unique().tolist() == classes and len(found["boxes"]) == number


def test_bounds_ascend():
    with pytest.raises(ValueError, match=r"must ascend, got \(0.5, 0.5\)"):
        PanopticTargetsd("label", bounds=(0.5, 0.5))


def small():
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone("resnet18", lambda c: nn.GroupNorm(8, c), 5, out_channels=16, global_pool=True)
    heads = {"box_features": 16, "mask_channels": 8, "anchor_sizes": ((8,), (16,), (32,), (64,), (128,))}
    return UPSNet(2, 1, backbone, (16, 8), scale=1.0, least_stuff=0, **heads)


def test_upsnet_learns_from_them_objects_of_one_pixel_too():
    network = small()
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    engine = SimpleNamespace(state=SimpleNamespace(device="cpu", iteration=1), network=network, optimizer=optimizer)
    iteration = DetectionIteration(("boxes", "labels", "masks", "semantic"), dtype=torch.float32)
    nothing = {"image": torch.rand(3, 64, 80), "label": torch.zeros(1, 64, 80)}
    batch = [PanopticTargetsd("label")(one) for one in (case(0.1), case(0.6), nothing)]
    losses = [iteration(engine, batch)["loss"].item() for _ in range(12)]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    target = {name: value for name, value in batch[0].items() if name != "label"}
    with pytest.raises(ValueError, match="x0 <= x1 and y0 <= y1, got"):
        network([batch[0]["image"]], [{**target, "boxes": target["boxes"] - torch.tensor([0.0, 0, 1, 0])}])

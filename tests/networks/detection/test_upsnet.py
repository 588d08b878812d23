"""UPSNet as a whole: its losses, its panoptic maps, what it refuses, and that it learns a drawn scene."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from medseg3d.networks.backbones.fpn import resnet_fpn_backbone
from medseg3d.networks.detection.panoptic_head import VOID
from medseg3d.networks.detection.upsnet import UPSNet

LOSSES = {
    "loss_classifier",
    "loss_box_reg",
    "loss_mask",
    "loss_objectness",
    "loss_rpn_box_reg",
    "loss_semantic",
    "loss_semantic_roi",
    "loss_panoptic",
}


def small(**arguments):
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone("resnet18", nn.BatchNorm2d, 5, out_channels=16, global_pool=True)
    heads = {"min_size": 96, "max_size": 160, "box_features": 32, "mask_channels": 16, "anchor_sizes": SIZES}
    settings = {"semantic_channels": (16, 8), "least_stuff": 20, **heads, **arguments}
    return UPSNet(2, 2, backbone, **settings)


SIZES = ((8,), (16,), (32,), (64,), (128,))


def scene(height=96, width=128):
    """A bright rectangle and a dark disc on ground and sky."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    rectangle = (rows >= 30) & (rows < 62) & (columns >= 12) & (columns < 44)
    disc = (rows - 50) ** 2 + (columns - 88) ** 2 < 18**2
    sky = rows < 40
    image = torch.where(sky, 0.7, 0.4).expand(3, -1, -1).clone()
    image[0][rectangle], image[1][disc] = 1.0, 0.0
    semantic = torch.where(sky, 0, 1)
    semantic[rectangle], semantic[disc] = 2, 3
    target = {
        "boxes": torch.tensor([[12.0, 30, 43, 61], [71, 33, 105, 67]]),
        "labels": torch.tensor([1, 2]),
        "masks": torch.stack([rectangle, disc]).byte(),
        "semantic": semantic,
    }
    return image, target


def nothing(target):
    empty = {name: target[name][:0] for name in ("boxes", "labels", "masks")}
    return {**empty, "semantic": target["semantic"].clamp(max=1)}


def test_pictures_of_float64():
    image, _ = scene()
    with torch.no_grad():
        (found,) = small().eval()([image.double()])
    assert found["semantic"].shape == image.shape[1:]


def test_losses_come_with_targets_only_and_reach_every_parameter():
    network, (image, target) = small(), scene()
    cut = {**target, "semantic": target["semantic"][:80, :100], "masks": target["masks"][:, :80, :100]}
    losses = network([image, image[:, :80, :100]], [target, nothing(cut)])
    assert losses.keys() == LOSSES and all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    without = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without
    network.eval()
    with torch.no_grad():
        assert isinstance(network([image]), list) and network([image], [target]).keys() == LOSSES


def test_no_objects_at_all():
    network, (image, target) = small(), scene()
    losses = network([image], [nothing(target)])
    assert all(loss.isfinite() for loss in losses.values())
    assert losses["loss_mask"] == 0 and losses["loss_semantic_roi"] == 0
    sum(losses.values()).backward()


def test_a_picture_of_which_nothing_is_known_teaches_no_semantics():
    network, (image, target) = small(), scene()
    unknown = {**nothing(target), "semantic": torch.full((96, 128), VOID)}
    losses = network([image], [unknown])
    assert losses["loss_semantic"] == 0 and losses["loss_semantic_roi"] == 0


def test_the_object_in_channel_255_is_no_void_in_the_panoptic_loss():
    """Only the last of 254 objects covers voxels; two classes of stuff come before them."""
    network, (image, target) = small(keep=1.0), scene()
    masks = torch.zeros(254, 96, 128, dtype=torch.uint8)
    masks[-1] = target["masks"][0]
    boxes, labels = target["boxes"][:1].expand(254, -1), torch.ones(254, dtype=torch.int64)
    semantic = torch.where(masks[-1] > 0, 2, VOID)
    losses = network([image], [{"boxes": boxes, "labels": labels, "masks": masks, "semantic": semantic}])
    assert losses["loss_panoptic"] > 0


def test_the_scene_is_learnt_and_told_at_the_pictures_size():
    network, (image, target) = small(roi_weight=0.0, panoptic_weight=0.5, semantic_weight=1.0), scene()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    for _ in range(120):
        losses = network([image], [target])
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert "loss_semantic_roi" not in losses
    network.eval()
    with torch.no_grad():
        (found,) = network([image])
    assert sorted(found["labels"].tolist()) == [1, 2] and (found["scores"] > 0.6).all()
    for number, label in enumerate(found["labels"].tolist()):
        wanted = target["masks"][label - 1].bool()
        own = found["instance"] == number + 1
        assert (own & wanted).sum() / (own | wanted).sum() > 0.8
        assert (found["masks"][number] & wanted).sum() / (found["masks"][number] | wanted).sum() > 0.8
        assert (found["category"][own] == label + 1).all()
    known = found["category"] != VOID
    assert known.float().mean() > 0.9
    assert (found["category"] == target["semantic"])[known].float().mean() > 0.97
    assert (found["semantic"] == target["semantic"]).float().mean() > 0.95


def test_odd_sizes_and_batches_of_them():
    network, (image, _) = small(min_size=64, max_size=100).eval(), scene()
    with torch.no_grad():
        found = network([image[:, :57, :91], image])
    assert [tuple(one["category"].shape) for one in found] == [(57, 91), (96, 128)]
    assert all(one["masks"].shape == (len(one["boxes"]), *one["category"].shape) for one in found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"semantic": None}, "target 0 needs integers \\(96, 128\\) as 'semantic', got none"),
        ({"semantic": torch.zeros(96, 128)}, "got torch.float32"),
        ({"semantic": torch.full((96, 128), 4)}, "semantic classes are 0 to 3 or 255, target 0 has 4 to 4"),
        ({"labels": torch.tensor([1, 3])}, "labels"),
    ],
)
def test_targets_that_do_not_fit(change, message):
    image, target = scene()
    with pytest.raises(ValueError, match=message):
        small()([image], [{**target, **change}])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"keep": 0}, "keep is a share"), ({"least_stuff": 1, "keep": 1.5}, "got 1.5")],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        small(**arguments)
    with pytest.raises(ValueError, match="at most 255 in all, got 200 stuff, 90 things"):
        UPSNet(200, 90, nn.Identity())

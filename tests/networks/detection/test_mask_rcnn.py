"""What Mask R-CNN keeps, in a tiny configuration."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from medseg3d.networks import MaskRCNN, build, maskrcnn_resnet50_fpn, maskrcnn_resnet50_fpn_v2
from medseg3d.networks.backbones.resnet import FrozenBatchNorm2d
from medseg3d.networks.detection.anchors import AnchorGenerator
from medseg3d.networks.detection.boxes import BoxCoder
from medseg3d.networks.detection.heads import FastRCNNPredictor, MaskRCNNPredictor, RPNHead
from medseg3d.networks.detection.roi_align import MultiScaleRoIAlign
from medseg3d.networks.detection.roi_heads import BoxSelection
from medseg3d.networks.detection.transform import DetectionTransform

TINY = {
    "backbone": "resnet18",
    "num_classes": 3,
    "min_size": 64,
    "max_size": 96,
    "fpn_channels": 16,
    "returned_layers": (1, 2, 3),
    "anchor_sizes": (8, 16, 32, 64),
    "box_features": 32,
    "mask_channels": 16,
    "rpn_post_nms_top_n_test": 20,
}
FEW = {"rpn_batch_size_per_image": 64, "rpn_post_nms_top_n_train": 50, "box_batch_size_per_image": 32}
LOSSES = ["loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"]


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    network = build("mask_rcnn", **TINY, box_score_thresh=0.1)
    with torch.no_grad():  # scores that differ
        network.rpn.head.cls_logits.weight.mul_(50)
        network.roi_heads.box_predictor.cls_score.weight.mul_(5)
    return network.eval()


@pytest.fixture
def images():
    random = torch.Generator().manual_seed(1)
    return [torch.rand(3, 60, 75, generator=random), torch.rand(3, 50, 41, generator=random)]


@pytest.fixture
def targets():
    masks = torch.zeros(2, 60, 75, dtype=torch.uint8)
    masks[0, 10:30, 20:40] = masks[1, 35:50, 5:30] = 1
    boxes = torch.tensor([[20.0, 10, 40, 30], [5, 35, 30, 50]])
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long), "masks": torch.zeros(0, 50, 41)}
    return [{"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": masks}, nothing]


def test_detections_lie_on_their_pictures(network, images):
    copies = [image.clone() for image in images]
    with torch.no_grad():
        detections = network(images)
    assert all(torch.equal(a, b) for a, b in zip(images, copies, strict=True))
    for image, found in zip(images, detections, strict=True):
        count, (height, width) = len(found["boxes"]), image.shape[1:]
        assert count > 0
        assert found["masks"].shape == (count, 1, height, width)
        assert found["masks"].min() >= 0 and found["masks"].max() <= 1
        assert (found["boxes"] >= 0).all() and (found["boxes"] <= torch.tensor([width, height] * 2)).all()
        assert (found["boxes"][:, :2] < found["boxes"][:, 2:]).all()
        assert found["labels"].dtype == torch.int64 and set(found["labels"].tolist()) <= {1, 2}
        assert (found["scores"] > 0.1).all() and torch.equal(found["scores"], found["scores"].sort(descending=True)[0])


def test_eval_is_deterministic_and_takes_a_batch(network):
    batch = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        first, second, alone = network(batch), network(list(batch)), network(batch[1:])
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    for name, values in alone[0].items():
        torch.testing.assert_close(values, first[1][name], rtol=1e-4, atol=1e-4)


def test_a_threshold_gives_bool_masks(network, images):
    with torch.no_grad():
        probabilities = network(images)
        network.mask_threshold = 0.5
        masks = network(images)
        network.mask_threshold = None
    for a, b in zip(probabilities, masks, strict=True):
        assert b["masks"].dtype == torch.bool and torch.equal(a["masks"] > 0.5, b["masks"])


def test_no_detections_are_empty_tensors(network, images):
    network.roi_heads.selection.score_thresh = 1.0
    with torch.no_grad():
        found = network(images)[0]
    network.roi_heads.selection.score_thresh = 0.1
    assert {name: tuple(x.shape) for name, x in found.items()} == {
        "boxes": (0, 4), "labels": (0,), "scores": (0,), "masks": (0, 1, 60, 75)
    }  # fmt: skip


@pytest.mark.parametrize("training", [False, True])
def test_losses_if_and_only_if_targets(images, targets, training):
    torch.manual_seed(0)
    network = MaskRCNN(**TINY).train(training)
    losses = network(images, targets)
    assert list(losses) == LOSSES
    assert all(loss.ndim == 0 and torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    without = [name for name, p in network.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert not without
    with torch.no_grad():
        assert isinstance(network(images), list)


def test_only_pictures_without_objects_still_train_every_parameter(targets):
    torch.manual_seed(0)
    network = MaskRCNN(**TINY)
    losses = network([torch.rand(3, 50, 41)], targets[1:])
    assert losses["loss_mask"] == 0 == losses["loss_rpn_box_reg"] and losses["loss_objectness"] > 0
    sum(losses.values()).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


def test_a_few_steps_find_the_object():
    """One bright square, learnt by heart: the system as a whole points downhill."""
    torch.manual_seed(0)
    network = MaskRCNN(**{**TINY, "num_classes": 2, "anchor_sizes": (16, 32, 32, 64)}, **FEW)
    image, mask = torch.zeros(3, 64, 64), torch.zeros(1, 64, 64)
    image[:, 20:44, 12:36] = mask[:, 20:44, 12:36] = 1
    target = {"boxes": torch.tensor([[12.0, 20, 36, 44]]), "labels": torch.tensor([1]), "masks": mask}
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
    for _ in range(90):
        loss = sum(network([image], [target]).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.train()  # statistics of so few steps are not those of the last one
    with torch.no_grad():
        found = network([image])[0]
    assert found["scores"][0] > 0.5
    assert (found["boxes"][0] - target["boxes"][0]).abs().max() < 5
    overlap = (found["masks"][0] > 0.5) & (mask > 0)
    assert overlap.sum() / ((found["masks"][0] > 0.5) | (mask > 0)).sum() > 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"boxes": torch.tensor([[5.0, 5, 5, 9], [0, 0, 1, 1]])},
            r"target 0: boxes are .*\[5.0, 5.0, 5.0, 9.0\] as box 0",
        ),
        ({"boxes": torch.full((2, 4), float("nan"))}, "target 0: boxes are .*finite"),
        ({"boxes": torch.zeros(2, 5)}, r"target 0: boxes are \(N, 4\), got \(2, 5\)"),
        ({"labels": torch.tensor([0, 1])}, "labels lie between 1 and 2 .*got 0 to 1"),
        ({"labels": torch.tensor([1, 3])}, "labels lie between 1 and 2 .*got 1 to 3"),
        ({"labels": torch.tensor([1])}, r"labels are \(2,\), int64"),
        ({"labels": torch.tensor([1.0, 2.0])}, "int64, one for each box, got .*float32"),
        ({"masks": torch.zeros(2, 10, 10)}, r"masks are \(2, 60, 75\).*got \(2, 10, 10\)"),
        (
            {"boxes": torch.tensor([[5.0, 5, 9, 9], [75, 0, 90, 9]])},
            r"on their image of 60 x 75 .* as box 1: leave out",
        ),
        ({"boxes": torch.tensor([[-9.0, 5, 0, 9], [0, 0, 9, 9]])}, r"got \[-9.0, 5.0, 0.0, 9.0\] as box 0"),
        ({"boxes": torch.tensor([[0.0, 0, 9, 9], [0, 0, 1e30, 9]])}, "within 1,000,000 pixels, got .* as box 1"),
        ({"masks": torch.full((2, 60, 75), 255)}, "masks hold 0 and 1, got 255 to 255: pass masks > 0"),
        ({"masks": None}, "it needs tensors boxes, labels, masks, and has no masks"),
    ],
)
def test_targets_that_are_none(network, images, targets, change, message):
    with pytest.raises(ValueError, match=message):
        network(images, [{**targets[0], **change}, targets[1]])


def test_objects_of_one_pixel_and_beyond_the_edge_are_learnt(images):
    """Losses and gradients are finite: a mask of one pixel, of none, and a box that reaches out of the picture."""
    masks = torch.zeros(3, 60, 75, dtype=torch.bool)
    masks[0, 5, 7] = masks[2, 50:, 60:] = True
    boxes = torch.tensor([[7.0, 5, 8, 6], [30, 20, 50, 40], [60, 50, 200, 90]])
    network = MaskRCNN(**TINY, **FEW)
    losses = network(images[:1], [{"boxes": boxes, "labels": torch.ones(3).long(), "masks": masks}])
    sum(losses.values()).backward()
    assert losses["loss_mask"] > 0
    assert all(torch.isfinite(parameter.grad).all() for parameter in network.parameters())


def test_pictures_of_one_pixel_of_nothing_and_of_one_value(network):
    for image in (
        torch.rand(3, 1, 1),
        torch.rand(3, 1, 200),
        torch.zeros(3, 40, 50),
        torch.full((3, 40, 50), torch.nan),
    ):
        with torch.no_grad():
            (found,) = network([image])
        assert found["masks"].shape == (len(found["boxes"]), 1, *image.shape[1:])
        assert not image.isnan().any() or not len(found["boxes"])


def test_as_many_targets_as_pictures(network, images, targets):
    with pytest.raises(ValueError, match="a dictionary for each of 2 images, got 1 of them"):
        network(images, targets[:1])
    with pytest.raises(ValueError, match="got one dictionary"):
        network(images, targets[0])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "there are no images"),
        ([torch.zeros(1, 40, 40)], r"images are \(3, height, width\).*image 0 has a shape of \(1, 40, 40\)"),
        ([torch.zeros(3, 40, 40), torch.zeros(3, 0, 40)], r"at least one pixel, image 1 .*\(3, 0, 40\)"),
        ([[[[0.5]]] * 3], "images are tensors, image 0 is a list"),
        ([torch.zeros(3, 40, 40, dtype=torch.uint8)], "floating-point values from 0 to 1, image 0 is torch.uint8"),
    ],
)
def test_pictures_that_are_none(network, images, message):
    with pytest.raises(ValueError, match=message):
        network(images)


def test_what_the_refusal_of_a_pil_picture_advises_works(network):
    image = Image.new("RGB", (50, 40), (10, 20, 30))
    for images in (image, [image]):
        with pytest.raises(ValueError, match="image 0 is a Image") as refusal:
            network(images)
    advice = str(refusal.value).partition(" pass ")[2]
    network([eval(advice, {"torch": torch, "np": np, "image": image})])


def test_keywords_and_numbers_that_are_none():
    with pytest.raises(TypeError, match="MaskRCNN has no keyword box_thresh; it has rpn_anchor_generator"):
        MaskRCNN("resnet18", 2, box_thresh=0.3)
    with pytest.raises(TypeError, match=r"no keyword norm_layer .of a backbone given by its name."):
        MaskRCNN(nn.Identity(), 2, norm_layer=nn.BatchNorm2d)
    with pytest.raises(ValueError, match="counts the background: 2 or more, got 1"):
        MaskRCNN("resnet18", 1)
    with pytest.raises(ValueError, match=r"backbone\.out_channels"):
        MaskRCNN(nn.Identity(), 2)
    with pytest.raises(ValueError, match="there is no backbone 'resnet19'"):
        MaskRCNN("resnet19", 2)


def predictors(classes, box_classes=None):
    return {
        "box_predictor": FastRCNNPredictor(32, box_classes or classes),
        "mask_predictor": MaskRCNNPredictor(16, 16, classes),
    }


def test_predictors_decide_the_number_of_classes(images, targets):
    """Those of the constructor, and those that take their place afterwards, as torchvision's recipe has it."""
    without = {name: value for name, value in TINY.items() if name != "num_classes"}
    assert MaskRCNN(**without).num_classes == 91
    network = MaskRCNN(**without, **FEW, **predictors(4))
    assert network.num_classes == 4
    one = {"box_predictor": predictors(5)["box_predictor"]}
    assert MaskRCNN(**without, **one).roi_heads.mask_predictor.mask_fcn_logits.out_channels == 5
    fourth = [{**targets[0], "labels": torch.tensor([1, 4])}, targets[1]]
    with pytest.raises(ValueError, match=r"labels lie between 1 and 3 .*num_classes=4"):
        network(images, fourth)
    network.roi_heads.box_predictor = predictors(6)["box_predictor"]
    with pytest.raises(ValueError, match="got 6 of box_predictor, 4 of mask_predictor: make all predictors for the"):
        network(images, fourth)
    with pytest.raises(ValueError, match="got 6 of box_predictor, 4 of mask_predictor"):
        network.eval()(images)
    network.train()
    network.roi_heads.mask_predictor = predictors(6)["mask_predictor"]
    assert all(torch.isfinite(loss) for loss in network(images, fourth).values())


@pytest.mark.parametrize("given", [predictors(4), predictors(4, box_classes=3), {"num_classes": 4, **predictors(3)}])
def test_predictors_of_other_numbers_of_classes(given):
    with pytest.raises(ValueError, match="num_classes and the predictors have one number of classes"):
        MaskRCNN(**{**TINY, **given})


def test_the_rpn_head_is_made_for_the_anchors():
    pixels = {"aspect_ratios": (0.5, 1.0), "rpn_anchor_generator": AnchorGenerator([(8, 16)] * 5, (1.0, 2.0))}
    with torch.device("meta"):
        for name, anchors in (("aspect_ratios", 2), ("rpn_anchor_generator", 4)):
            head = maskrcnn_resnet50_fpn_v2(2, min_size=64, **{name: pixels[name]}).rpn.head
            assert (head.cls_logits.out_channels, head.bbox_pred.out_channels) == (anchors, 4 * anchors)
    with pytest.raises(ValueError, match=r"for 2 anchors a pixel.*cls_logits.out_channels=2, got 3: build it with"):
        MaskRCNN(**TINY, aspect_ratios=(0.5, 1.0), rpn_head=RPNHead(16, 3))
    MaskRCNN(**TINY, rpn_head=RPNHead(16, 3))


@pytest.mark.parametrize("size", [(1, 1), (20, 33), (40, 40), (66, 10)])
def test_the_heads_see_maps_at_their_strides_however_small_the_picture(size, monkeypatch):
    scales, of_levels = [], MultiScaleRoIAlign.levels
    monkeypatch.setattr(
        MultiScaleRoIAlign, "levels", lambda pool, boxes, s: scales.append(list(s)) or of_levels(pool, boxes, s)
    )
    torch.manual_seed(0)
    network = MaskRCNN(**TINY | {"min_size": min(size), "max_size": max(size)}, box_score_thresh=0.0)
    objects = {
        "boxes": torch.tensor([[0.0, 0, 1, 1]]),
        "labels": torch.tensor([1]),
        "masks": torch.ones(1, *size, dtype=torch.bool),
    }
    with torch.no_grad():
        network.eval()([torch.rand(3, *size)])
        network([torch.rand(3, *size)], [objects])
    assert scales == [[1 / 4, 1 / 8, 1 / 16]] * 4


def test_one_channel_and_one_map():
    class OneMap(nn.Sequential):
        out_channels = 8

    backbone = OneMap(nn.Conv2d(1, 8, 3, stride=4, padding=1))
    arguments = {"image_mean": (0.5,), "image_std": (0.2,), "anchor_sizes": ((8, 16),), "fixed_size": (48, 64)}
    network = MaskRCNN(backbone, 2, **arguments, box_features=8, mask_channels=8, box_score_thresh=0.0).eval()
    with torch.no_grad():
        (found,) = network([torch.rand(1, 30, 40)])
    assert found["masks"].shape[1:] == (1, 30, 40) and len(found["boxes"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_pictures_of_any_float_type(network, images, targets, dtype):
    cast = [image.to(dtype) for image in images]
    with torch.no_grad():
        found, same = network(cast)[0], network([image.float() for image in cast])[0]
        assert all(torch.isfinite(loss) for loss in network(cast, targets).values())
    assert found["boxes"].dtype == torch.float32 and len(found["boxes"])
    if dtype == torch.float64:
        torch.testing.assert_close(found, same)


def test_bfloat16_autocast_gives_float32_results(network, images, targets):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, losses = network(images)[0], network(images, targets)
    assert {found[name].dtype for name in ("boxes", "scores", "masks")} == {torch.float32}
    assert all(loss.dtype == torch.float32 and torch.isfinite(loss) for loss in losses.values())


def test_detections_of_different_classes_suppress_each_other_only_if_asked():
    logits, codes = torch.tensor([[0.0, 2, 1.9]]), torch.zeros(1, 12)
    box = torch.tensor([[2.0, 3, 30, 20]])
    for agnostic, labels in ((False, [1, 2]), (True, [1])):
        found = BoxSelection(BoxCoder(), class_agnostic=agnostic)(logits, codes, box, (40, 40))
        assert found["labels"].tolist() == labels and torch.equal(found["boxes"][0], box[0])
    shared_codes = BoxSelection(BoxCoder())(logits, codes[:, :4], box, (40, 40))
    assert shared_codes["labels"].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("build", "count"), [(maskrcnn_resnet50_fpn, 44_401_393), (maskrcnn_resnet50_fpn_v2, 46_359_409)]
)
def test_parameters_of_the_public_forms(build, count):
    with torch.device("meta"):
        network = build()
    assert sum(p.numel() for p in network.parameters()) == count
    frozen = any(isinstance(module, FrozenBatchNorm2d) for module in network.modules())
    assert frozen == (build is maskrcnn_resnet50_fpn)


def test_settings_of_the_selection_are_where_torchvision_has_them(network, images):
    heads = network.roi_heads
    given = heads.score_thresh, heads.nms_thresh, heads.detections_per_img
    try:
        heads.score_thresh, heads.nms_thresh, heads.detections_per_img = 0.0, 1.0, 1
        assert all(len(found["boxes"]) == 1 for found in network(images))
    finally:
        heads.score_thresh, heads.nms_thresh, heads.detections_per_img = given


def test_sizes_of_pictures():
    """Sides are rounded down; the longer one is bound; a picture may be a single pixel."""
    transform = DetectionTransform(min_size=(64, 80), max_size=120)
    batch, records, _ = transform([torch.zeros(3, 50, 70), torch.zeros(3, 200, 30), torch.zeros(3, 1, 1)])
    assert [record.resized for record in records] == [(80, 112), (120, 18), (80, 80)]
    assert batch.shape == (3, 3, 128, 128)
    drawn = {transform([torch.zeros(3, 50, 70)], [{"boxes": torch.zeros(0, 4)}])[1][0].resized[0] for _ in range(20)}
    assert drawn == {64, 80}
    with pytest.raises(ValueError, match="image_std have a number for each channel"):
        DetectionTransform(image_mean=(0.5,))


def test_one_scale_for_pictures_of_all_sizes():
    transform = DetectionTransform(scale=1.5)
    batch, records, _ = transform([torch.rand(3, 10, 31), torch.rand(3, 40, 20)])
    assert [record.resized for record in records] == [(15, 46), (60, 30)]
    assert batch.shape == (2, 3, 64, 64)
    assert MaskRCNN("resnet18", 2, scale=2.0).transform.scale == 2.0
    for arguments in ({"scale": 0.0}, {"scale": 2.0, "fixed_size": (8, 8)}):
        with pytest.raises(ValueError, match="scale is a positive factor, without a fixed_size"):
            DetectionTransform(**arguments)

"""Operations of detectors against torchvision 0.28 (golden/2d/ops)."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from medseg3d.networks.detection import boxes as box_ops
from medseg3d.networks.detection.anchors import AnchorGenerator
from medseg3d.networks.detection.boxes import BoxCoder
from medseg3d.networks.detection.losses import box_head_loss, mask_loss, sigmoid_focal_loss
from medseg3d.networks.detection.masks import masks_of_own_class, paste_masks_in_image, project_masks_on_boxes
from medseg3d.networks.detection.matching import Matcher
from medseg3d.networks.detection.nms import batched_nms
from medseg3d.networks.detection.roi_align import MultiScaleRoIAlign, roi_align
from medseg3d.networks.detection.transform import DetectionTransform
from tests.parity.golden2d import check


class Arrays:
    """One file of reference values."""

    def __init__(self, path):
        self.arrays = np.load(path)
        self.names = self.arrays.files

    def __getitem__(self, name):
        return torch.from_numpy(self.arrays[name])

    def masks(self, name, shape):
        return torch.from_numpy(np.unpackbits(self.arrays[name])[: int(np.prod(shape))].reshape(tuple(shape)))

    def check(self, name, ours, tolerance=1e-4):
        check(torch.as_tensor(ours).detach().numpy(), self.arrays[name], tolerance, name)


@pytest.fixture
def stored(shared):
    return lambda name: Arrays(shared("golden", "2d", "ops", f"{name}.npz"))


def test_roi_align(stored):
    golden = stored("roi_align")
    outputs = [name for name in golden.names if name.startswith("out_")]
    assert len(outputs) == 28
    for name in outputs:
        _, scale, aligned, ratio, size = name.split("_")
        height, width = map(int, size.split("x"))
        arguments = (height, width), float(scale[1:]), int(ratio[1:]), aligned == "a1"
        golden.check(name, roi_align(golden["feature"], golden[f"rois_scale{scale[1:]}"], *arguments))


def test_gradient_of_roi_align(stored):
    golden = stored("roi_align")
    feature = golden["feature"].requires_grad_()
    roi_align(feature, golden["rois_scale0.25"], 7, 0.25, 2, aligned=True).backward(golden["grad_out"])
    golden.check("grad_feature", feature.grad, 1e-3)


def test_roi_align_on_a_pyramid(stored):
    golden = stored("multiscale_roi_align")
    names = ["0", "1", "2", "3"]
    maps = {name: golden[f"feat_{name}"] for name in [*names, "pool"]}
    boxes = [golden["boxes0"], golden["boxes1"]]
    shapes = [tuple(shape) for shape in golden["image_sizes"].tolist()]
    golden.check("out7_r2", MultiScaleRoIAlign(names, 7, 2)(maps, boxes, shapes))
    golden.check("out7_r0", MultiScaleRoIAlign(names, 7, 0)(maps, boxes, shapes))
    golden.check("out14_r2", MultiScaleRoIAlign(names, 14, 2)(maps, boxes, shapes)[..., ::2, ::2])
    golden.check("levels", MultiScaleRoIAlign(names, 7, 2).levels(torch.cat(boxes), golden["scales"].tolist()))


def test_nms(stored):
    golden = stored("nms")
    cases = [name for name in golden.names if "_keep_" in name and "negative" not in name]
    assert len(cases) == 17
    for name in cases:
        kind, threshold = name.split("_keep_")
        source = kind if kind in ("degenerate", "big") else "random"
        scores = "ties_scores" if "ties" in kind else f"{source}_scores"
        groups = golden["big_idxs"] if kind == "big" else golden["batched_idxs"] if "batched" in kind else None
        golden.check(name, batched_nms(golden[f"{source}_boxes"], golden[scores], groups, float(threshold)))
    golden.check("empty_keep", batched_nms(torch.zeros(0, 4), torch.zeros(0), None, 0.5))


def test_batched_nms_keeps_the_box_that_offsets_lose_at_negative_coordinates(stored):
    golden = stored("nms")
    boxes, scores, groups = golden["random_boxes"], golden["random_scores"], golden["batched_idxs"]
    keep = batched_nms(boxes, scores, groups, 0.5)
    assert set(golden["batched_negative_keep_0.5"].tolist()) < set(keep.tolist())
    alone = [torch.where(groups == group)[0] for group in groups.unique()]
    alone = torch.cat([index[batched_nms(boxes[index], scores[index], None, 0.5)] for index in alone])
    assert sorted(alone.tolist()) == sorted(keep.tolist())


def test_boxes(stored):
    golden = stored("boxes")
    a, b = golden["a"], golden["b"]
    golden.check("iou", box_ops.box_iou(a, b))
    golden.check("giou", box_ops.generalized_box_iou(a, b))
    golden.check("area", box_ops.box_area(a))
    golden.check("clip", box_ops.clip_boxes_to_image(a, (60, 80)))
    golden.check("small_keep", box_ops.remove_small_boxes(a, 20))
    for name in ("cxcywh", "xywh"):
        golden.check(name, box_ops.box_convert(a, "xyxy", name))
        golden.check("a", box_ops.box_convert(golden[name], name, "xyxy"))


@pytest.mark.parametrize(("name", "weights"), [("rpn", (1, 1, 1, 1)), ("box", (10, 10, 5, 5))])
def test_box_coder(stored, name, weights):
    golden, coder = stored("boxes"), BoxCoder(weights)
    golden.check(f"coder_{name}_encode", coder.encode(golden[f"coder_{name}_gt"], golden["a"]))
    golden.check(f"coder_{name}_decode", coder.decode(golden[f"coder_{name}_codes"], golden["a"]))
    golden.check("bbox_xform_clip", coder.largest_scale)


def test_matcher(stored):
    golden = stored("boxes")
    golden.check("matcher_rpn", Matcher(0.7, 0.3, allow_low_quality_matches=True)(golden["matcher_iou"]))
    golden.check("matcher_box", Matcher(0.5, 0.5)(golden["matcher_iou"]))
    golden.check("matcher_tied_rpn", Matcher(0.7, 0.3, allow_low_quality_matches=True)(golden["matcher_tied_iou"]))


def test_anchors(stored, shared):
    golden = stored("anchors")
    cases = json.loads(shared("golden", "2d", "ops", "anchors.json").read_text())["cases"]
    for i, case in enumerate(cases):
        generator = AnchorGenerator(case["sizes"], case["aspect_ratios"])
        maps = [torch.zeros(1, 1, *size) for size in case["grids_hw"]]
        golden.check(f"case{i}_anchors", torch.cat(generator(maps, case["padded_image_hw"])))
        assert generator.num_anchors_per_location() == case["per_location"]
        for j, cell in enumerate(generator.cell_anchors):
            golden.check(f"case{i}_cell{j}", cell)


def test_masks(stored):
    golden = stored("masks")
    masks, boxes, size = golden["masks"], golden["boxes"], golden["shape"].tolist()
    golden.check("pasted", paste_masks_in_image(masks, boxes, size))
    assert torch.equal(paste_masks_in_image(masks, boxes, size, threshold=0.5), golden["pasted"] > 0.5)
    golden.check("targets", project_masks_on_boxes(golden["gt_masks"], golden["rois"], golden["matched"], 28))


def test_losses_of_the_heads(stored):
    golden = stored("masks")
    labels = golden["gt_labels"][golden["matched"]]
    golden.check("mask_loss", mask_loss(golden["mask_logits"], labels, golden["targets"]))
    golden.check("inference", masks_of_own_class(golden["mask_logits"], labels).sigmoid()[:, None])
    wanted = golden["box_labels"], golden["box_targets"]
    classification, regression = box_head_loss(golden["cls_logits"], golden["box_reg"], *wanted)
    golden.check("loss_classifier", classification)
    golden.check("loss_box_reg", regression)


def test_focal_loss_and_boxes_of_masks(stored):
    golden = stored("losses")
    cases = [name for name in golden.names if name.startswith("focal_")]
    assert len(cases) == 3
    for name in cases:
        alpha, gamma = map(float, name.split("_")[1:])
        golden.check(name, sigmoid_focal_loss(golden["logits"], golden["target"], alpha, gamma))
    golden.check("masks_to_boxes", box_ops.masks_to_boxes(golden["target"] > 0.5))


def test_transform(stored):
    golden = stored("rcnn_transform")
    images = [golden["img0"], golden["img1"]]
    targets = [
        {"boxes": golden[f"boxes{i}"], "masks": golden.masks(f"masks{i}", (3, *image.shape[1:]))}
        for i, image in enumerate(images)
    ]
    batch, records, moved = DetectionTransform(*golden["min_max_size"].tolist())(images, targets)
    golden.check("batch", batch)
    golden.check("sizes", torch.tensor([record.resized for record in records]))
    for i, (target, record) in enumerate(zip(moved, records, strict=True)):
        golden.check(f"out_boxes{i}", target["boxes"])
        assert torch.equal(target["masks"], golden.masks(f"out_masks{i}", golden[f"out_masks{i}_shape"].tolist()))
        torch.testing.assert_close(record.to_original(target["boxes"]), targets[i]["boxes"], rtol=1e-5, atol=1e-5)

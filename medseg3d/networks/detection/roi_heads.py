"""What becomes of proposals: classes, boxes and masks (Girshick, "Fast R-CNN", ICCV 2015; He et al., "Mask R-CNN",
ICCV 2017), in the form that torchvision has of it.

Shape legend: R regions of all images of a batch, N of one; K classes with background as class 0; ``boxes_N4`` are
(x0, y0, x1, y1) in pixels of the resized image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from medseg3d.networks.detection.boxes import BoxCoder, box_iou, clip_boxes_to_image, in_full_precision
from medseg3d.networks.detection.losses import box_head_loss, mask_loss
from medseg3d.networks.detection.masks import masks_of_own_class, project_masks_on_boxes
from medseg3d.networks.detection.matching import BETWEEN, BalancedSampler, Matcher
from medseg3d.networks.detection.nms import batched_nms

Maps = Mapping[str, torch.Tensor]
Target = Mapping[str, torch.Tensor]
Detection = dict[str, torch.Tensor]
Sizes = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Samples:
    """Boxes of one image that the heads learn from.

    Attributes:
        boxes_N4: proposals and boxes of objects, those with an object first.
        objects_N: index of the object that each one learns from; of no meaning for background.
        labels_N: class, 0 for background.
        codes_N4: codes of that object's box.
    """

    boxes_N4: torch.Tensor
    objects_N: torch.Tensor
    labels_N: torch.Tensor
    codes_N4: torch.Tensor


class TargetSampler:
    """Chooses what the heads learn from which proposals; the boxes of the objects join the proposals.

    Args:
        matcher, sampler, coder: choose what a box learns, which boxes learn, and code it.
    """

    def __init__(self, matcher: Matcher, sampler: BalancedSampler, coder: BoxCoder) -> None:
        self.matcher, self.sampler, self.coder = matcher, sampler, coder

    @torch.no_grad()
    def __call__(self, proposals_N4: torch.Tensor, target: Target) -> Samples:
        """Samples of an image whose target has "boxes" (G, 4) and "labels" (G,)."""
        objects_G4, classes_G = in_full_precision(target["boxes"]), target["labels"]
        boxes = torch.cat((proposals_N4, objects_G4))
        matches = self.matcher(box_iou(objects_G4, boxes, self.coder.inclusive))
        nothing = torch.zeros_like(matches)
        objects = matches.clamp(min=0)
        labels = classes_G[objects] if len(classes_G) else nothing
        labels = torch.where(matches >= 0, labels, torch.where(matches == BETWEEN, -1, nothing))
        chosen = torch.cat(self.sampler(labels))
        boxes, objects, labels = boxes[chosen], objects[chosen], labels[chosen]
        codes = self.coder.encode(objects_G4[objects], boxes) if len(objects_G4) else torch.zeros_like(boxes)
        return Samples(boxes, objects, labels, codes)


class BoxSelection:
    """Turns logits and codes into detections: decode, threshold, suppress, keep the best.

    Args:
        coder: decodes.
        score_thresh: a detection has a probability above it.
        nms_thresh: IoU above which a detection gives way to a better one.
        detections_per_img: the most of an image.
        class_agnostic: let detections of different classes suppress each other.
        min_size: least side of a detection, in pixels.
    """

    def __init__(
        self,
        coder: BoxCoder,
        score_thresh: float = 0.05,
        nms_thresh: float = 0.5,
        detections_per_img: int = 100,
        class_agnostic: bool = False,
        min_size: float = 1e-2,
    ) -> None:
        self.coder = coder
        self.score_thresh, self.nms_thresh, self.detections_per_img = score_thresh, nms_thresh, detections_per_img
        self.class_agnostic, self.min_size = class_agnostic, min_size

    def __call__(
        self, logits_NK: torch.Tensor, codes_NX: torch.Tensor, boxes_N4: torch.Tensor, shape: Sequence[int]
    ) -> Detection:
        """ "boxes" (D, 4), "labels" (D,) from 1 on, and "scores" (D,) of an image, the best first.

        Args:
            logits_NK: logits of the classes.
            codes_NX: codes (N, 4 K) of a box for each class, or (N, 4) for all.
            boxes_N4: what the codes refer to.
            shape: (height, width) of the image, to which boxes are clipped.
        """
        inclusive = self.coder.inclusive
        scores = in_full_precision(logits_NK).softmax(1)[:, 1:]
        boxes = clip_boxes_to_image(self.coder.decode(codes_NX, boxes_N4), shape, inclusive)
        boxes = boxes[:, 1:] if boxes.shape[1] > 1 else boxes.expand(-1, scores.shape[1], 4)
        sides = boxes[..., 2:] - boxes[..., :2] + inclusive
        row, column = torch.where((scores > self.score_thresh) & (sides >= self.min_size).all(-1))
        boxes, scores, labels = boxes[row, column], scores[row, column], column + 1
        groups = None if self.class_agnostic else labels
        keep = batched_nms(boxes, scores, groups, self.nms_thresh, inclusive=inclusive)[: self.detections_per_img]
        return {"boxes": boxes[keep], "labels": labels[keep], "scores": scores[keep]}


def _of_selection(name: str) -> property:
    """A setting of ``selection``, where torchvision has it."""
    return property(lambda heads: getattr(heads.selection, name), lambda heads, v: setattr(heads.selection, name, v))


class RoIHeads(nn.Module):
    """Box head and, unless ``mask_head`` is None, mask head.

    Args:
        box_roi_pool: features of boxes: called with (maps, boxes of each image, padded shapes of the images).
        box_head, box_predictor: pooled features -> features -> (logits, codes).
        target_sampler: chooses what is learnt from; its coder is that of the boxes.
        selection: makes detections.
        mask_roi_pool, mask_head, mask_predictor: the same way to masks (R, K, M, M).
        box_loss_beta: of smooth L1.
    """

    def __init__(
        self,
        box_roi_pool: nn.Module,
        box_head: nn.Module,
        box_predictor: nn.Module,
        target_sampler: TargetSampler,
        selection: BoxSelection,
        mask_roi_pool: nn.Module | None = None,
        mask_head: nn.Module | None = None,
        mask_predictor: nn.Module | None = None,
        box_loss_beta: float = 1 / 9,
    ) -> None:
        super().__init__()
        self.box_roi_pool, self.box_head, self.box_predictor = box_roi_pool, box_head, box_predictor
        self.target_sampler, self.selection, self.box_loss_beta = target_sampler, selection, box_loss_beta
        self.mask_roi_pool, self.mask_head, self.mask_predictor = mask_roi_pool, mask_head, mask_predictor

    score_thresh = _of_selection("score_thresh")
    nms_thresh = _of_selection("nms_thresh")
    detections_per_img = _of_selection("detections_per_img")

    def forward(
        self,
        features: Maps,
        proposals: Sequence[torch.Tensor],
        image_shapes: Sizes,
        padded_shapes: Sizes | None = None,
    ) -> list[Detection]:
        """Detections of each image; "masks" (D, 1, M, M) are probabilities in the frames of their boxes.

        Args:
            features: maps by name, the finest first.
            proposals: (N, 4) of each image.
            image_shapes: (height, width) of the images before they are padded.
            padded_shapes: the same with their padding, which tells the strides of the maps; without it they follow from
                the largest of ``image_shapes``, which is right from 68 pixels on.
        """
        detections = self.detect(features, proposals, image_shapes, padded_shapes)
        if self.mask_head is not None:
            logits_RKMM = self.masks(features, [d["boxes"] for d in detections], padded_shapes or image_shapes)
            labels_R = torch.cat([d["labels"] for d in detections])
            own = masks_of_own_class(logits_RKMM, labels_R)[:, None]
            parts = in_full_precision(own).sigmoid().split([len(d["labels"]) for d in detections])
            for detection, masks in zip(detections, parts, strict=True):
                detection["masks"] = masks
        return detections

    def losses(
        self, features: Maps, proposals: Sequence[torch.Tensor], padded_shapes: Sizes, targets: Sequence[Target]
    ) -> dict[str, torch.Tensor]:
        """Losses of the heads on samples of the proposals; the targets have "boxes", "labels" and "masks"."""
        samples = [self.target_sampler(p, t) for p, t in zip(proposals, targets, strict=True)]
        logits_RK, codes_RX = self.boxes(features, [s.boxes_N4 for s in samples], padded_shapes)
        labels_R = torch.cat([s.labels_N for s in samples])
        wanted_R4 = torch.cat([s.codes_N4 for s in samples])
        classification, regression = box_head_loss(logits_RK, codes_RX, labels_R, wanted_R4, self.box_loss_beta)
        losses = {"loss_classifier": classification, "loss_box_reg": regression}
        if self.mask_head is not None:
            losses["loss_mask"] = self._mask_loss(features, samples, padded_shapes, targets)
        return losses

    def _mask_loss(
        self, features: Maps, samples: Sequence[Samples], padded_shapes: Sizes, targets: Sequence[Target]
    ) -> torch.Tensor:
        found = [torch.where(s.labels_N > 0)[0] for s in samples]
        boxes = [s.boxes_N4[i] for s, i in zip(samples, found, strict=True)]
        logits_RKMM = self.masks(features, boxes, padded_shapes)
        size = logits_RKMM.shape[-1]
        wanted = [
            project_masks_on_boxes(t["masks"], box, s.objects_N[i], size)
            for t, box, s, i in zip(targets, boxes, samples, found, strict=True)
        ]
        labels_R = torch.cat([s.labels_N[i] for s, i in zip(samples, found, strict=True)])
        return mask_loss(logits_RKMM, labels_R, torch.cat(wanted))

    def boxes(
        self, features: Maps, boxes: Sequence[torch.Tensor], padded_shapes: Sizes
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (R, K) and codes (R, 4 K) of boxes (N, 4) of each image."""
        return self.box_predictor(self.box_head(self.box_roi_pool(features, boxes, padded_shapes)))

    def masks(self, features: Maps, boxes: Sequence[torch.Tensor], padded_shapes: Sizes) -> torch.Tensor:
        """Mask logits (R, K, M, M) of any boxes (N, 4) of each image: detections, samples or given ones."""
        if self.mask_roi_pool is None or self.mask_head is None or self.mask_predictor is None:
            raise ValueError("these heads have no mask head: build them with mask_roi_pool, mask_head, mask_predictor")
        return self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, padded_shapes)))

    def detect(
        self,
        features: Maps,
        proposals: Sequence[torch.Tensor],
        image_shapes: Sizes,
        padded_shapes: Sizes | None = None,
    ) -> list[Detection]:
        """Detections of each image, without masks."""
        logits_RK, codes_RX = self.boxes(features, proposals, padded_shapes or image_shapes)
        counts = [len(boxes) for boxes in proposals]
        parts = zip(logits_RK.split(counts), codes_RX.split(counts), proposals, image_shapes, strict=True)
        return [self.selection(logits, codes, boxes, shape) for logits, codes, boxes, shape in parts]

"""UPSNet: Xiong et al., "UPSNet: A Unified Panoptic Segmentation Network", CVPR 2019, written from the paper.

One pyramid, a Mask R-CNN and a semantic head of deformable convolutions on it, and a panoptic head without parameters.
Boxes count their last pixels (Detectron's convention), suppression does not ask for classes. Departures from the paper:
pictures are RGB from 0 to 1; what is found is told at the picture's own size.

Semantic classes are numbered stuff first, then things; 255 is void. Labels of boxes count things from 1, as Mask R-CNN
does.

Shape legend: ``image_CHW`` is a picture, ``logits_BKQR`` are semantic logits of K classes at a quarter of its size,
``boxes_N4`` are (x0, y0, x1, y1) in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from medseg3d.networks.backbones.fpn import resnet_fpn_backbone
from medseg3d.networks.backbones.resnet import FrozenBatchNorm2d
from medseg3d.networks.detection.boxes import in_full_precision
from medseg3d.networks.detection.mask_rcnn import MAPS, MaskRCNN
from medseg3d.networks.detection.masks import masks_of_own_class, paste_masks_in_image
from medseg3d.networks.detection.panoptic_head import (
    IGNORED,
    VOID,
    clean_up,
    panoptic_logits,
    panoptic_target,
    remove_overlaps,
)
from medseg3d.networks.detection.roi_align import roi_align
from medseg3d.networks.detection.semantic_head import DeformableSemanticHead
from medseg3d.networks.detection.targets import check_targets
from medseg3d.networks.detection.transform import ResizeRecord

Maps = Mapping[str, torch.Tensor]
STRIDE = 4  # of the semantic logits
ROI_SIZE = 28


class UPSNet(nn.Module):
    """Panoptic maps of pictures; with targets, the losses, weighted and ready to be summed.

    Args:
        stuff: number of classes of stuff, which come first.
        things: number of classes of things.
        backbone: name of a ResNet, for one with frozen batch norm as in the paper; or a module from images to maps
            "0" to "3" of strides 4 to 32 and any more that the RPN is to see, with ``out_channels``.
        semantic_channels: widths of the deformable convolutions: (256, 128, 128) for COCO, two of them for Cityscapes.
        semantic_weight, panoptic_weight: of the losses: 0.2 and 0.1 for COCO, 1.0 and 0.5 for Cityscapes.
        roi_weight: of the semantic loss within objects, times ``semantic_weight``: 0.2 for COCO, 0 without.
        keep: share of the objects that the panoptic head is shown in training; the others it is to find unknown.
        most_overlap: an object goes if better ones of its class cover more of it.
        least_stuff: a class of stuff with fewer pixels in a picture is void: 4096 for COCO, 2048 for Cityscapes.
        global_pool: of the pyramid (COCO).
        settings: keywords of ``MaskRCNN``.

    Raises:
        ValueError: on arguments out of range; in ``forward``, on pictures or targets that are none.
    """

    def __init__(
        self,
        stuff: int = 53,
        things: int = 80,
        backbone: nn.Module | str = "resnet50",
        semantic_channels: Sequence[int] = (256, 128, 128),
        semantic_weight: float = 0.2,
        panoptic_weight: float = 0.1,
        roi_weight: float = 0.2,
        keep: float = 0.7,
        most_overlap: float = 0.3,
        least_stuff: int = 4096,
        global_pool: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__()
        if stuff < 0 or things < 1 or stuff + things > VOID:
            raise ValueError(
                f"one class of things or more, and at most {VOID} in all, got {stuff} stuff, {things} things"
            )
        if not 0 < keep <= 1:
            raise ValueError(f"keep is a share above 0 and up to 1, got {keep}")
        self.stuff, self.things = stuff, things
        self.semantic_weight, self.panoptic_weight, self.roi_weight = semantic_weight, panoptic_weight, roi_weight
        self.keep, self.most_overlap, self.least_stuff = keep, most_overlap, least_stuff
        if isinstance(backbone, str):
            backbone = resnet_fpn_backbone(backbone, FrozenBatchNorm2d, 3, global_pool=global_pool, stride_in_1x1=True)
        detectron = {"inclusive": True, "class_agnostic_nms": True, "box_score_thresh": 0.6, "box_loss_beta": 1.0}
        self.detector = MaskRCNN(backbone, things + 1, **{**detectron, **settings})
        channels: Any = self.detector.backbone.out_channels
        self.semantic_head = DeformableSemanticHead(channels, stuff + things, semantic_channels, len(MAPS))

    def forward(
        self, images: Sequence[torch.Tensor], targets: Sequence[Mapping[str, torch.Tensor]] | None = None
    ) -> Any:
        """What is seen in each picture, or, if and only if there are targets, losses by name.

        Args:
            images: pictures (C, H, W) of any sizes, floating-point from 0 to 1, or a batch of them.
            targets: for each picture what ``MaskRCNN`` takes, and "semantic" (H, W), integers: stuff from 0, things
                from ``stuff`` on, 255 where it is not known.

        Returns:
            A list with, for each picture, "category" (H, W), classes with 255 for void, and "instance" (H, W), 1 to N
            or 0, which together are the panoptic map; "semantic" (H, W), classes; and of the N objects of the map
            "boxes" (N, 4), "labels" (N,), from 1, "scores" (N,) and "masks" (N, H, W), bool. Or a dictionary of the
            losses of ``MaskRCNN``, "loss_semantic", "loss_semantic_roi" and "loss_panoptic".
        """
        if targets is not None:
            check_targets(images, targets, self.things + 1, True, self.detector.inclusive)
            self._check_semantic(images, targets)
        batch_BCHW, records, moved = self.detector.transform(images, targets)
        shapes = [record.resized for record in records]
        height, width = batch_BCHW.shape[2:]
        padded = [(height, width)] * len(shapes)
        features = self.detector.maps(batch_BCHW)
        logits_BKQR = self.semantic_head([features[name] for name in MAPS])
        proposals, losses = self.detector.rpn(features, shapes, (height, width), moved)
        if targets is None or moved is None:
            detections = self.detector.roi_heads.detect(features, proposals, shapes, padded)
            masks = self._own_masks(features, detections, padded)
            parts = zip(logits_BKQR, detections, masks, records, strict=True)
            return [self._panoptic(logits, found, own, record) for logits, found, own, record in parts]
        semantic_BHW = self._semantic_target(targets, records, (height, width))
        return {
            **self.detector.roi_heads.losses(features, proposals, padded, moved),
            **losses,
            **self._semantic_losses(logits_BKQR, semantic_BHW, moved),
            "loss_panoptic": self.panoptic_weight
            * self._panoptic_loss(features, logits_BKQR, semantic_BHW, moved, padded),
        }

    def _check_semantic(self, images: Sequence[torch.Tensor], targets: Sequence[Mapping[str, torch.Tensor]]) -> None:
        classes = self.stuff + self.things
        for number, (image, target) in enumerate(zip(images, targets, strict=True)):
            semantic = target.get("semantic")
            if semantic is None or semantic.shape != image.shape[1:] or semantic.is_floating_point():
                got = "none" if semantic is None else f"{semantic.dtype} {tuple(semantic.shape)}"
                raise ValueError(f"target {number} needs integers {tuple(image.shape[1:])} as 'semantic', got {got}")
            known = semantic[semantic != VOID]
            if known.numel() and not 0 <= int(known.min()) <= int(known.max()) < classes:
                raise ValueError(
                    f"semantic classes are 0 to {classes - 1} or {VOID}, target {number} has {int(known.min())} to "
                    f"{int(known.max())}"
                )

    @staticmethod
    def _semantic_target(
        targets: Sequence[Mapping[str, torch.Tensor]], records: Sequence[ResizeRecord], size: Sequence[int]
    ) -> torch.Tensor:
        """(B, H, W) of the batch, void beyond the pictures."""
        device = targets[0]["semantic"].device
        padded = torch.full((len(targets), *size), VOID, dtype=torch.int64, device=device)
        for slot, target, record in zip(padded, targets, records, strict=True):
            height, width = record.resized
            slot[:height, :width] = record.resize_masks(target["semantic"][None])[0]
        return padded

    def _semantic_losses(
        self, logits_BKQR: torch.Tensor, semantic_BHW: torch.Tensor, targets: Sequence[Mapping[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """Of the whole pictures, at their size, and of the boxes of the objects alone."""
        logits = in_full_precision(logits_BKQR)
        whole = _cross_entropy(_enlarged(logits, semantic_BHW.shape[1:]), semantic_BHW)
        losses = {"loss_semantic": self.semantic_weight * whole}
        if self.roi_weight:
            boxes = [in_full_precision(target["boxes"]) for target in targets]
            crops = roi_align(logits, boxes, ROI_SIZE, 1 / STRIDE, 2)
            wanted = [_crops(semantic, box) for semantic, box in zip(semantic_BHW, boxes, strict=True)]
            losses["loss_semantic_roi"] = (
                self.semantic_weight * self.roi_weight * _cross_entropy(crops, torch.cat(wanted))
            )
        return losses

    def _panoptic_loss(
        self,
        features: Maps,
        logits_BKQR: torch.Tensor,
        semantic_BHW: torch.Tensor,
        targets: Sequence[Mapping[str, torch.Tensor]],
        shapes: Sequence[tuple[int, int]],
    ) -> torch.Tensor:
        """Cross-entropy of the panoptic head that is shown some of the objects, at a quarter of the size."""
        masks = self._own_masks(features, targets, shapes)
        losses = []
        for logits, semantic, target, own in zip(logits_BKQR, semantic_BHW, targets, masks, strict=True):
            kept = self._shown(len(own), own.device)
            objects = torch.zeros((len(own), *semantic.shape), dtype=torch.bool, device=own.device)
            height, width = target["masks"].shape[1:]
            objects[:, :height, :width] = target["masks"] > 0
            wanted = panoptic_target(semantic[::STRIDE, ::STRIDE], objects[:, ::STRIDE, ::STRIDE], kept, self.stuff)
            boxes = in_full_precision(target["boxes"])[kept] / STRIDE
            found = panoptic_logits(
                in_full_precision(logits), boxes, target["labels"][kept] - 1, in_full_precision(own[kept]), self.stuff
            )
            losses.append(_cross_entropy(found[None], wanted[None], IGNORED))
        return torch.stack(losses).mean()

    def _shown(self, count: int, device: torch.device) -> torch.Tensor:
        """Indices of the objects that are kept: a random share of them, at least one."""
        order = torch.randperm(count, device=device)
        return order[: max(1, round(self.keep * count))].sort().values

    def _own_masks(
        self, features: Maps, objects: Sequence[Mapping[str, torch.Tensor]], shapes: Sequence[tuple[int, int]]
    ) -> tuple[torch.Tensor, ...]:
        """Mask logits (N, M, M) of each picture's boxes, of the classes of their labels."""
        counts = [len(one["labels"]) for one in objects]
        boxes = [in_full_precision(one["boxes"]) for one in objects]
        logits_RKMM = self.detector.roi_heads.masks(features, boxes, shapes)
        labels_R = torch.cat([one["labels"] for one in objects])
        return masks_of_own_class(logits_RKMM, labels_R).split(counts)

    def _panoptic(
        self, logits_KQR: torch.Tensor, found: Mapping[str, torch.Tensor], masks: torch.Tensor, record: ResizeRecord
    ) -> dict[str, torch.Tensor]:
        size = record.original
        # At the size of the batch first: the logits reach beyond a picture that was padded.
        padded = [STRIDE * n for n in logits_KQR.shape[1:]]
        height, width = record.resized
        semantic = _enlarged(_enlarged(in_full_precision(logits_KQR)[None], padded)[..., :height, :width], size)[0]
        boxes, masks = record.to_original(found["boxes"]), in_full_precision(masks)
        kept = remove_overlaps(boxes, found["scores"], found["labels"], masks, size, self.most_overlap)
        boxes, labels, masks = boxes[kept], found["labels"][kept], masks[kept]
        panoptic = panoptic_logits(semantic, boxes, labels - 1, masks, self.stuff).argmax(0)
        cleaned = clean_up(panoptic, semantic, labels - 1, self.stuff, self.least_stuff)
        return {
            "category": cleaned.category_HW,
            "instance": cleaned.instance_HW,
            "semantic": semantic.argmax(0),
            "boxes": boxes,
            "labels": labels,
            "scores": found["scores"][kept],
            "masks": paste_masks_in_image(masks, boxes, size, padding=0, threshold=0.0),
        }


def _enlarged(logits_BKHW: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    if tuple(logits_BKHW.shape[2:]) == tuple(size):
        return logits_BKHW
    return F.interpolate(logits_BKHW, size=tuple(size), mode="bilinear", align_corners=False)


def _cross_entropy(logits_BKHW: torch.Tensor, classes_BHW: torch.Tensor, ignored: int = VOID) -> torch.Tensor:
    """The mean over what is not ``ignored``; 0 where all is."""
    total = F.cross_entropy(logits_BKHW, classes_BHW.long(), ignore_index=ignored, reduction="sum")
    return total / (classes_BHW != ignored).sum().clamp(min=1)


def _crops(semantic_HW: torch.Tensor, boxes_N4: torch.Tensor) -> torch.Tensor:
    """Classes (N, ROI_SIZE, ROI_SIZE) at the centres of the bins of each box."""
    bins = (torch.arange(ROI_SIZE, device=boxes_N4.device) + 0.5) / ROI_SIZE
    x_NS = boxes_N4[:, :1] + bins * (boxes_N4[:, 2:3] - boxes_N4[:, :1])
    y_NS = boxes_N4[:, 1:2] + bins * (boxes_N4[:, 3:] - boxes_N4[:, 1:2])
    rows = y_NS.long().clamp(0, semantic_HW.shape[0] - 1)
    columns = x_NS.long().clamp(0, semantic_HW.shape[1] - 1)
    return semantic_HW[rows[:, :, None], columns[:, None, :]]

"""Mask R-CNN: He, Gkioxari, Dollár and Girshick, ICCV 2017, on a feature pyramid, in the two forms that torchvision has
of it, with its keywords, its defaults and its state_dict keys, those of 2021 included.

What this form does otherwise than the paper: 512 samples an image for the heads and 1000 proposals without a look at
other images; smooth L1 with a beta of 1/9; RoIAlign without the half-pixel shift. Departures from torchvision: losses
are returned if and only if targets are given, in training and in eval mode; an object that no anchor overlaps gets no
anchor instead of all; suppression never moves classes apart by offsets, so it is exact; regions are looked up at the
strides that the maps have, in pictures lower than 68 pixels too.

Shape legend: ``image_CHW`` is a picture, ``boxes_N4`` are (x0, y0, x1, y1) in its pixels, ``masks_N1HW`` lie on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from medseg3d.networks.backbones.fpn import resnet_fpn_backbone
from medseg3d.networks.backbones.resnet import FrozenBatchNorm2d
from medseg3d.networks.detection.anchors import PYRAMID_SIZES, RATIOS, AnchorGenerator
from medseg3d.networks.detection.boxes import BoxCoder
from medseg3d.networks.detection.heads import (
    FastRCNNConvFCHead,
    FastRCNNPredictor,
    MaskRCNNHeads,
    MaskRCNNPredictor,
    RPNHead,
    TwoMLPHead,
)
from medseg3d.networks.detection.masks import paste_masks_in_image
from medseg3d.networks.detection.matching import BalancedSampler, Matcher
from medseg3d.networks.detection.roi_align import MultiScaleRoIAlign
from medseg3d.networks.detection.roi_heads import BoxSelection, RoIHeads, TargetSampler
from medseg3d.networks.detection.rpn import RegionProposalNetwork
from medseg3d.networks.detection.targets import check_targets
from medseg3d.networks.detection.transform import DetectionTransform

MAPS = ("0", "1", "2", "3")  # of the pyramid, for the heads; the RPN also sees what comes after them
CODE_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
CLASSES = 91  # of COCO, with background
# Keywords of MaskRCNN beside its named ones, as torchvision has them, and their defaults; None: made as published.
SETTINGS: dict[str, Any] = {
    "rpn_anchor_generator": None,
    "rpn_head": None,
    "rpn_pre_nms_top_n_train": 2000,
    "rpn_pre_nms_top_n_test": 1000,
    "rpn_post_nms_top_n_train": 2000,
    "rpn_post_nms_top_n_test": 1000,
    "rpn_nms_thresh": 0.7,
    "rpn_fg_iou_thresh": 0.7,
    "rpn_bg_iou_thresh": 0.3,
    "rpn_batch_size_per_image": 256,
    "rpn_positive_fraction": 0.5,
    "rpn_score_thresh": 0.0,
    "box_roi_pool": None,
    "box_head": None,
    "box_predictor": None,
    "box_score_thresh": 0.05,
    "box_nms_thresh": 0.5,
    "box_detections_per_img": 100,
    "box_fg_iou_thresh": 0.5,
    "box_bg_iou_thresh": 0.5,
    "box_batch_size_per_image": 512,
    "box_positive_fraction": 0.25,
    "bbox_reg_weights": None,
    "mask_roi_pool": None,
    "mask_head": None,
    "mask_predictor": None,
    # What follows is ours.
    "anchor_sizes": None,  # of each map, for the anchor generator
    "aspect_ratios": RATIOS,
    "box_features": 1024,  # width of the box head
    "mask_channels": 256,  # width of the mask head
    "box_loss_beta": 1 / 9,
    "class_agnostic_nms": False,
    "inclusive": False,  # a box's x1, y1 are its last pixels (Detectron)
    "mask_threshold": None,  # return masks as bool, above this probability
    "scale": None,  # factor of the sides of every picture, instead of min_size and max_size
}
# Keywords of a backbone that is given by its name.
BACKBONE_SETTINGS: dict[str, Any] = {
    "norm_layer": nn.BatchNorm2d,
    "trainable_backbone_layers": 5,
    "fpn_channels": 256,
    "fpn_norm_layer": None,
    "returned_layers": (1, 2, 3, 4),
}


class MaskRCNN(nn.Module):
    """Boxes, classes, scores and masks of the objects in pictures; with targets, the losses.

    For people who train from nothing: ``MaskRCNN("resnet18", num_classes=2)`` has batch norm and nothing frozen. The
    public weights fit ``maskrcnn_resnet50_fpn`` and ``maskrcnn_resnet50_fpn_v2``.

    Args:
        backbone: a module from images to maps by name, the finest first, with ``out_channels``; or a name of
            ``RESNETS``, for a ResNet with a pyramid.
        num_classes: classes, with background as class 0: 2 for one kind of object. None for as many as the predictors
            that are given have, and 91 if none is.
        min_size: shorter side of the resized pictures; several to draw from in training.
        max_size: bound of the longer side.
        image_mean, image_std: of each channel of pictures from 0 to 1; as many as there are channels.
        fixed_size: (height, width) of every resized picture, instead of the two bounds.
        settings: any of ``SETTINGS`` and, if the backbone is a name, of ``BACKBONE_SETTINGS``. Modules are reused as
            they are; a ``box_predictor`` or ``mask_predictor`` must have ``num_classes`` classes where that is given.

    ``network.roi_heads.box_predictor`` and ``mask_predictor`` may be replaced, for other classes: both of them.

    Raises:
        ValueError: on arguments out of range, and predictors of other numbers of classes or an ``rpn_head`` of another
            number of anchors than the rest has; in ``forward``, on pictures or targets that are none.
        TypeError: on other keywords.
    """

    def __init__(
        self,
        backbone: nn.Module | str = "resnet50",
        num_classes: int | None = None,
        min_size: int | Sequence[int] = 800,
        max_size: int = 1333,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
        fixed_size: tuple[int, int] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        s = _complete(settings, isinstance(backbone, str))
        self._classes_at_first = _agreed_classes(num_classes, s.box_predictor, s.mask_predictor) or CLASSES
        self.transform = DetectionTransform(
            min_size, max_size, image_mean, image_std, fixed_size=fixed_size, scale=s.scale
        )
        if isinstance(backbone, str):
            backbone = _pyramid(backbone, len(self.transform.image_mean), s)
        channels = getattr(backbone, "out_channels", None)
        if not isinstance(channels, int):
            raise ValueError("the backbone must say how many channels its maps have, as backbone.out_channels")
        self.backbone = backbone
        self.rpn = _rpn(channels, s)
        self.roi_heads = _roi_heads(channels, self._classes_at_first, s)
        self.mask_threshold, self.inclusive = s.mask_threshold, s.inclusive

    @property
    def num_classes(self) -> int:
        """Classes, with background, of the predictors that there are now.

        Raises:
            ValueError: they have different numbers of classes.
        """
        heads = self.roi_heads
        return _agreed_classes(None, heads.box_predictor, heads.mask_predictor) or self._classes_at_first

    def forward(
        self, images: Sequence[torch.Tensor], targets: Sequence[Mapping[str, torch.Tensor]] | None = None
    ) -> Any:
        """Detections of each picture, or, if and only if there are targets, losses by name.

        Args:
            images: pictures (C, H, W) of any sizes, floating-point from 0 to 1, or a batch of them.
            targets: for each picture "boxes" (N, 4) with x0 < x1 and y0 < y1, "labels" (N,), int64 from 1 to
                num_classes - 1, and "masks" (N, H, W) of 0 and 1. N may be 0.

        Returns:
            A list with, for each picture, "boxes" (N, 4) in its pixels, "labels" (N,), "scores" (N,) from 0 to 1, the
            best first, and "masks" (N, 1, H, W), probabilities or, with ``mask_threshold``, bool. Or a dictionary of
            "loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness" and "loss_rpn_box_reg", to be summed.
        """
        classes = self.num_classes  # predictors that were replaced must agree, with targets or without
        if targets is not None:
            check_targets(images, targets, classes, True, self.inclusive)
        batch_BCHW, records, moved = self.transform(images, targets)
        shapes = [record.resized for record in records]
        height, width = batch_BCHW.shape[2:]
        padded = [(height, width)] * len(shapes)
        features = self.maps(batch_BCHW)
        proposals, losses = self.rpn(features, shapes, (height, width), moved)
        if moved is not None:
            return {**self.roi_heads.losses(features, proposals, padded, moved), **losses}
        detections = self.roi_heads(features, proposals, shapes, padded)
        for detection, record in zip(detections, records, strict=True):
            detection["boxes"] = record.to_original(detection["boxes"])
            detection["masks"] = paste_masks_in_image(
                detection["masks"], detection["boxes"], record.original, threshold=self.mask_threshold
            )[:, None]
        return detections

    def maps(self, batch_BCHW: torch.Tensor) -> Any:
        """The backbone's maps by name, of a batch of any float type."""
        own = next((parameter.dtype for parameter in self.backbone.parameters()), batch_BCHW.dtype)
        features = self.backbone(batch_BCHW.to(own))
        return {"0": features} if isinstance(features, torch.Tensor) else features


def maskrcnn_resnet50_fpn(
    num_classes: int | None = None,
    *,
    trainable_backbone_layers: int = 3,
    norm_eps: float = 0.0,
    **settings: Any,
) -> MaskRCNN:
    """The first form, with frozen batch norm: 44,401,393 parameters with 91 classes.

    It is meant to be filled with public weights: the stem and the first stage are frozen too. To train from nothing
    take ``MaskRCNN("resnet50", ...)``.

    Args:
        num_classes: classes, with background; 91 unless predictors are given.
        trainable_backbone_layers: how many of conv1, layer1, ..., layer4, from the last one, are trained.
        norm_eps: added to the variances: 0.0 suits the public weights of COCO, 1e-5 those of ImageNet.
        settings: keywords of ``MaskRCNN``.
    """

    def norm_layer(channels: int) -> nn.Module:
        return FrozenBatchNorm2d(channels, norm_eps)

    backbone = resnet_fpn_backbone("resnet50", norm_layer, trainable_backbone_layers)
    return MaskRCNN(backbone, num_classes, **settings)


def maskrcnn_resnet50_fpn_v2(
    num_classes: int | None = None, *, trainable_backbone_layers: int = 3, **settings: Any
) -> MaskRCNN:
    """The second form: batch norm everywhere, two convolutions in the RPN, four and one linear layer in the box head.

    46,359,409 parameters with 91 classes. Li et al., "Benchmarking detection transfer learning with vision
    transformers", 2021. Arguments as for ``maskrcnn_resnet50_fpn``.
    """
    norm = nn.BatchNorm2d
    backbone = resnet_fpn_backbone("resnet50", norm, trainable_backbone_layers, fpn_norm_layer=norm)
    channels, anchors = backbone.out_channels, _anchors(SimpleNamespace(**{**SETTINGS, **settings}))
    parts = {
        "rpn_head": RPNHead(channels, _per_pixel(anchors), conv_depth=2),
        "box_head": FastRCNNConvFCHead((channels, 7, 7), [256] * 4, [1024], norm),
        "mask_head": MaskRCNNHeads(channels, [256] * 4, norm_layer=norm),
    }
    return MaskRCNN(backbone, num_classes, **{**parts, **settings})


def _complete(settings: Mapping[str, Any], by_name: bool) -> SimpleNamespace:
    known = {**SETTINGS, **BACKBONE_SETTINGS} if by_name else SETTINGS
    if unknown := settings.keys() - known.keys():
        hint = "" if by_name or not unknown & BACKBONE_SETTINGS.keys() else " (of a backbone given by its name)"
        raise TypeError(f"MaskRCNN has no keyword {', '.join(sorted(unknown))}{hint}; it has {', '.join(known)}")
    return SimpleNamespace(**{**known, **settings})


def _pyramid(name: str, in_channels: int, s: SimpleNamespace) -> nn.Module:
    if s.anchor_sizes is None:
        s.anchor_sizes = PYRAMID_SIZES[: len(s.returned_layers) + 1]
    return resnet_fpn_backbone(
        name,
        s.norm_layer,
        s.trainable_backbone_layers,
        s.returned_layers,
        fpn_norm_layer=s.fpn_norm_layer,
        out_channels=s.fpn_channels,
        in_channels=in_channels,
    )


def _agreed_classes(number: int | None, box_predictor: Any, mask_predictor: Any) -> int | None:
    """The classes that are asked for or that predictors tell of themselves; None if nothing tells."""
    box = getattr(getattr(box_predictor, "cls_score", None), "out_features", None)
    mask = getattr(getattr(mask_predictor, "mask_fcn_logits", None), "out_channels", None)
    told = {"num_classes": number, "box_predictor": box, "mask_predictor": mask}
    told = {name: classes for name, classes in told.items() if classes is not None}
    if len(set(told.values())) > 1:
        raise ValueError(
            "num_classes and the predictors have one number of classes, with background, got "
            f"{', '.join(f'{classes} of {name}' for name, classes in told.items())}: make all predictors for the same "
            "classes, and leave num_classes out where they are given"
        )
    classes = next(iter(told.values()), None)
    if classes is not None and classes < 2:
        raise ValueError(f"num_classes counts the background: 2 or more, got {classes}")
    return classes


def _anchors(s: SimpleNamespace) -> AnchorGenerator:
    return s.rpn_anchor_generator or AnchorGenerator(s.anchor_sizes or PYRAMID_SIZES, s.aspect_ratios)


def _per_pixel(anchors: AnchorGenerator) -> int:
    numbers = anchors.num_anchors_per_location()
    if len(set(numbers)) != 1:
        raise ValueError(f"the RPN needs as many anchors on every map, got {numbers}")
    return numbers[0]


def _check_rpn_head(head: nn.Module, per_pixel: int) -> None:
    for name, channels in (("cls_logits", per_pixel), ("bbox_pred", 4 * per_pixel)):
        got = getattr(getattr(head, name, None), "out_channels", None)
        if got not in (None, channels):
            raise ValueError(
                f"an rpn_head for {per_pixel} anchors a pixel, as many as the anchor generator makes, has "
                f"{name}.out_channels={channels}, got {got}: build it with "
                "num_anchors=rpn_anchor_generator.num_anchors_per_location()[0]"
            )


def _rpn(channels: int, s: SimpleNamespace) -> RegionProposalNetwork:
    anchors = _anchors(s)
    head = s.rpn_head or RPNHead(channels, _per_pixel(anchors))
    _check_rpn_head(head, _per_pixel(anchors))
    return RegionProposalNetwork(
        anchors,
        head,
        Matcher(s.rpn_fg_iou_thresh, s.rpn_bg_iou_thresh, allow_low_quality_matches=True),
        BalancedSampler(s.rpn_batch_size_per_image, s.rpn_positive_fraction),
        BoxCoder(inclusive=s.inclusive),
        {"training": s.rpn_pre_nms_top_n_train, "testing": s.rpn_pre_nms_top_n_test},
        {"training": s.rpn_post_nms_top_n_train, "testing": s.rpn_post_nms_top_n_test},
        s.rpn_nms_thresh,
        s.rpn_score_thresh,
    )


def _roi_heads(channels: int, num_classes: int, s: SimpleNamespace) -> RoIHeads:
    coder = BoxCoder(s.bbox_reg_weights or CODE_WEIGHTS, inclusive=s.inclusive)
    box_pool = s.box_roi_pool or MultiScaleRoIAlign(MAPS, 7, 2, inclusive=s.inclusive)
    rows, columns = box_pool.output_size
    box_head = s.box_head or TwoMLPHead(channels * rows * columns, s.box_features)
    mask_head = s.mask_head or MaskRCNNHeads(channels, [s.mask_channels] * 4)
    return RoIHeads(
        box_pool,
        box_head,
        s.box_predictor or FastRCNNPredictor(_last_width(box_head, nn.Linear), num_classes),
        TargetSampler(
            Matcher(s.box_fg_iou_thresh, s.box_bg_iou_thresh),
            BalancedSampler(s.box_batch_size_per_image, s.box_positive_fraction),
            coder,
        ),
        BoxSelection(coder, s.box_score_thresh, s.box_nms_thresh, s.box_detections_per_img, s.class_agnostic_nms),
        s.mask_roi_pool or MultiScaleRoIAlign(MAPS, 14, 2, inclusive=s.inclusive),
        mask_head,
        s.mask_predictor or MaskRCNNPredictor(_last_width(mask_head, nn.Conv2d), s.mask_channels, num_classes),
        s.box_loss_beta,
    )


def _last_width(head: nn.Module, kind: type[nn.Linear] | type[nn.Conv2d]) -> int:
    """Outputs of the last layer of that kind."""
    layers = [module for module in head.modules() if isinstance(module, kind)]
    if not layers:
        raise ValueError(f"{type(head).__name__} has no {kind.__name__}: pass box_predictor and mask_predictor as well")
    return layers[-1].weight.shape[0]

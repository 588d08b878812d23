"""The region proposal network: Ren et al., "Faster R-CNN", NeurIPS 2015, section 3.1, on a pyramid (Lin et al., "FPN",
CVPR 2017, section 4.1), in the form that torchvision has of it.

Shape legend: ``logits_BN`` and ``codes_BN4`` belong to the N anchors of a map, ``boxes_N4`` are (x0, y0, x1, y1) in
pixels of the resized image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from medseg3d.networks.detection.anchors import AnchorGenerator
from medseg3d.networks.detection.boxes import BoxCoder, box_iou, clip_boxes_to_image, in_full_precision
from medseg3d.networks.detection.losses import smooth_l1_per_sample
from medseg3d.networks.detection.matching import BACKGROUND, BalancedSampler, Matcher
from medseg3d.networks.detection.nms import batched_nms

Sizes = Sequence[tuple[int, int]]


class RegionProposalNetwork(nn.Module):
    """Proposes boxes that may hold an object of any class; with targets also its two losses.

    Args:
        anchor_generator: makes the anchors.
        head: gives their logits and codes.
        matcher, sampler, coder: choose what the anchors learn, which ones learn, and code it.
        pre_nms_top_n: the best anchors of each map that go on, for "training" and "testing".
        post_nms_top_n: the best proposals of an image that stay, likewise.
        nms_thresh: IoU above which a proposal gives way to a better one of the same map.
        score_thresh: least probability of a proposal.
        min_size: least side of a proposal, in pixels.
    """

    def __init__(
        self,
        anchor_generator: AnchorGenerator,
        head: nn.Module,
        matcher: Matcher,
        sampler: BalancedSampler,
        coder: BoxCoder,
        pre_nms_top_n: Mapping[str, int],
        post_nms_top_n: Mapping[str, int],
        nms_thresh: float = 0.7,
        score_thresh: float = 0.0,
        min_size: float = 1e-3,
    ) -> None:
        super().__init__()
        self.anchor_generator = anchor_generator
        self.head = head
        self.matcher, self.sampler, self.coder = matcher, sampler, coder
        self.pre_nms_top_n, self.post_nms_top_n = dict(pre_nms_top_n), dict(post_nms_top_n)
        self.nms_thresh, self.score_thresh, self.min_size = nms_thresh, score_thresh, min_size

    def forward(
        self,
        features: Mapping[str, torch.Tensor],
        image_shapes: Sizes,
        padded_shape: Sequence[int],
        targets: Sequence[Mapping[str, torch.Tensor]] | None = None,
    ) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        """Proposals (N, 4) of each image, the best first, and losses if there are targets.

        Args:
            features: maps by name, the finest first.
            image_shapes: (height, width) of the images before they are padded.
            padded_shape: (height, width) of the batch.
            targets: "boxes" (G, 4) of each image.
        """
        maps = list(features.values())
        anchors = self.anchor_generator(maps, padded_shape)
        logits, codes = self.head(maps)
        logits = [in_full_precision(x.permute(0, 2, 3, 1).flatten(1)) for x in logits]
        codes = [in_full_precision(x.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3)) for x in codes]
        mode = "testing" if targets is None else "training"
        with torch.no_grad():
            proposals = self._propose(logits, codes, anchors, image_shapes, mode)
        if targets is None:
            return proposals, {}
        return proposals, self._losses(torch.cat(logits, 1), torch.cat(codes, 1), torch.cat(anchors), targets)

    def _propose(
        self,
        logits: Sequence[torch.Tensor],
        codes: Sequence[torch.Tensor],
        anchors: Sequence[torch.Tensor],
        image_shapes: Sizes,
        mode: str,
    ) -> list[torch.Tensor]:
        all_boxes, all_logits, all_levels = [], [], []
        for level, (logits_BN, codes_BN4, anchors_N4) in enumerate(zip(logits, codes, anchors, strict=True)):
            # Only what goes on is decoded.
            best_BK, index_BK = logits_BN.topk(min(self.pre_nms_top_n[mode], logits_BN.shape[1]), 1)
            chosen_BK4 = codes_BN4.gather(1, index_BK[..., None].expand(-1, -1, 4))
            boxes = self.coder.decode(chosen_BK4.flatten(0, 1), anchors_N4[index_BK.flatten()])
            all_boxes.append(boxes.view_as(chosen_BK4))
            all_logits.append(best_BK)
            all_levels.append(torch.full_like(index_BK[0], level))
        boxes_BN4, scores_BN, levels_N = (
            torch.cat(all_boxes, 1),
            torch.cat(all_logits, 1).sigmoid(),
            torch.cat(all_levels),
        )
        inclusive, proposals = self.coder.inclusive, []
        for boxes, scores, shape in zip(boxes_BN4, scores_BN, image_shapes, strict=True):
            boxes = clip_boxes_to_image(boxes, shape, inclusive)
            sides = boxes[:, 2:] - boxes[:, :2] + inclusive
            fit = torch.where((sides >= self.min_size).all(1) & (scores >= self.score_thresh))[0]
            keep = fit[batched_nms(boxes[fit], scores[fit], levels_N[fit], self.nms_thresh, inclusive=inclusive)]
            proposals.append(boxes[keep[: self.post_nms_top_n[mode]]])
        return proposals

    def _losses(
        self,
        logits_BN: torch.Tensor,
        codes_BN4: torch.Tensor,
        anchors_N4: torch.Tensor,
        targets: Sequence[Mapping[str, torch.Tensor]],
    ) -> dict[str, torch.Tensor]:
        """Mean binary cross-entropy of the sampled anchors; smooth L1 of those with an object, per sampled anchor."""
        sampled_logits, wanted, found_codes, wanted_codes = [], [], [], []
        for logits_N, codes_N4, target in zip(logits_BN, codes_BN4, targets, strict=True):
            boxes_G4 = in_full_precision(target["boxes"])
            matches_N = self.matcher(box_iou(boxes_G4, anchors_N4, self.coder.inclusive))
            labels_N = torch.where(matches_N >= 0, 1, torch.where(matches_N == BACKGROUND, 0, -1))
            objects, background = self.sampler(labels_N)
            sampled = torch.cat((objects, background))
            sampled_logits.append(logits_N[sampled])
            wanted.append(labels_N[sampled].to(logits_N.dtype))
            found_codes.append(codes_N4[objects])
            wanted_codes.append(self.coder.encode(boxes_G4[matches_N[objects]], anchors_N4[objects]))
        logits, labels = torch.cat(sampled_logits), torch.cat(wanted)
        objectness = F.binary_cross_entropy_with_logits(logits, labels) if len(labels) else logits.sum()
        regression = smooth_l1_per_sample(torch.cat(found_codes), torch.cat(wanted_codes), len(labels))
        return {"loss_objectness": objectness, "loss_rpn_box_reg": regression}

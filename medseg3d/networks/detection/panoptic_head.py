"""The parameter-free panoptic head and what follows it (Xiong et al., "UPSNet", CVPR 2019, sections 3.1 and 3.3).

Semantic classes are numbered stuff first, then things. Panoptic channels are the stuff classes, the N instances in the
order they are given in, and last the unknown class.

Shape legend: ``semantic_KHW`` are logits of all K classes, ``boxes_N4`` are x0, y0, x1, y1 in voxels of the image with
the last voxel's index for x1 and y1 (Detectron's convention), ``classes_N`` count things from 0, ``masks_Nmm`` are mask
logits over each box, of the class that was found there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from medseg3d.networks.detection.masks import paste_masks_in_image

VOID = 255  # of classes
IGNORED = -1  # of panoptic channels, of which an image with many objects has a channel 255


def panoptic_logits(
    semantic_KHW: torch.Tensor,
    boxes_N4: torch.Tensor,
    classes_N: torch.Tensor,
    masks_Nmm: torch.Tensor,
    stuff: int,
) -> torch.Tensor:
    """Logits (stuff + N + 1, H, W); their argmax is the panoptic map, their softmax cross-entropy the panoptic loss.

    An instance has within its box the logit of its class plus that of its mask; the unknown class has what the things
    have at most beyond what the instances explain (section 3.3, figure 4). Differentiable in both logits.

    Raises:
        ValueError: on numbers of classes, boxes and masks that do not fit together.
    """
    _check(semantic_KHW, boxes_N4, classes_N, masks_Nmm, stuff)
    things = semantic_KHW[stuff:]
    size = (semantic_KHW.shape[1], semantic_KHW.shape[2])
    by_class = [_within_box(things[c], box) for c, box in zip(classes_N.tolist(), boxes_N4, strict=True)]
    explained = torch.stack(by_class) if by_class else things.new_zeros(1, *size)
    unknown = things.amax(0) - explained.amax(0)
    masks = paste_masks_in_image(masks_Nmm, boxes_N4, size, padding=0)
    instances = [x + mask for x, mask in zip(by_class, masks, strict=True)]
    return torch.stack([*semantic_KHW[:stuff], *instances, unknown])


def _check(semantic: torch.Tensor, boxes: torch.Tensor, classes: torch.Tensor, masks: torch.Tensor, stuff: int) -> None:
    if not 0 <= stuff < len(semantic):
        raise ValueError(
            f"stuff is the number of stuff classes, 0 to {len(semantic) - 1} of {len(semantic)}, got {stuff}"
        )
    if not len(boxes) == len(classes) == len(masks):
        raise ValueError(f"one class and one mask a box: got {len(boxes)}, {len(classes)} and {len(masks)} of them")
    things = len(semantic) - stuff
    if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < things:
        got = f"{int(classes.min())} to {int(classes.max())}"
        raise ValueError(f"classes count things from 0 to {things - 1}, got {got}")


def _within_box(logits_HW: torch.Tensor, box: torch.Tensor) -> torch.Tensor:
    """``logits_HW`` within the box, whose end is rounded, and 0 outside."""
    x0, y0, x1, y1 = box.tolist()
    rows, columns = _from_0(int(y0), round(y1) + 1), _from_0(int(x0), round(x1) + 1)
    inside = torch.zeros_like(logits_HW)
    inside[rows, columns] = logits_HW[rows, columns]
    return inside


def _from_0(start: int, stop: int) -> slice:
    """Empty where it ends before 0: a slice would count a negative stop from the far end."""
    return slice(max(0, start), max(0, stop))


def remove_overlaps(
    boxes_N4: torch.Tensor,
    scores_N: torch.Tensor,
    classes_N: torch.Tensor,
    masks_Nmm: torch.Tensor,
    size: tuple[int, int],
    most: float = 0.3,
) -> torch.Tensor:
    """Indices of the instances that stay, best score first (section 3.3, mask pruning).

    From the best score down: an instance whose mask (logit above 0) is empty, or more than ``most`` of which better
    instances of its class have taken, goes.
    """
    taken: dict[int, torch.Tensor] = {}
    kept = []
    masks = paste_masks_in_image(masks_Nmm, boxes_N4, size, padding=0, threshold=0.0)
    for number in scores_N.argsort(descending=True, stable=True).tolist():
        mask = masks[number]
        area = int(mask.sum())
        of_class = taken.setdefault(int(classes_N[number]), torch.zeros_like(mask))
        if area and int((mask & of_class).sum()) <= most * area:
            of_class |= mask
            kept.append(number)
    return torch.tensor(kept, dtype=torch.int64, device=boxes_N4.device)


@dataclass(frozen=True)
class PanopticMap:
    """Classes of the voxels, ``VOID`` where there is none, and instances: 1 to N in the order given, 0 for stuff."""

    category_HW: torch.Tensor
    instance_HW: torch.Tensor


def clean_up(
    panoptic_HW: torch.Tensor,
    semantic_KHW: torch.Tensor,
    classes_N: torch.Tensor,
    stuff: int,
    least_stuff: int = 4096,
) -> PanopticMap:
    """The argmax of ``panoptic_logits`` as classes and instances (section 3.3 and the rules of its evaluation).

    An instance at least half of which the semantic head calls one class of stuff becomes that stuff; what is unknown,
    and a class of stuff that covers less than ``least_stuff`` voxels, is void.
    """
    by_semantics = semantic_KHW.argmax(0)
    category = torch.where(panoptic_HW < stuff, panoptic_HW, VOID)
    instance = torch.zeros_like(panoptic_HW)
    for number, thing in enumerate(classes_N.tolist()):
        where = panoptic_HW == stuff + number
        counts = torch.bincount(by_semantics[where], minlength=len(semantic_KHW))
        majority = int(counts.argmax())
        if majority < stuff and 2 * int(counts[majority]) >= int(counts.sum()) > 0:
            category[where] = majority
        else:
            category[where] = stuff + thing
            instance[where] = number + 1
    for stuff_class in range(stuff):
        where = category == stuff_class
        if int(where.sum()) < least_stuff:
            category[where] = VOID
    return PanopticMap(category, instance)


def panoptic_target(
    semantic_HW: torch.Tensor, instances_NHW: torch.Tensor, kept: torch.Tensor, stuff: int
) -> torch.Tensor:
    """Panoptic channel (H, W), int64, of each voxel for the panoptic loss; ``IGNORED`` where the semantics are void.

    Args:
        semantic_HW: stuff classes, then things; voxels of ``VOID`` are ignored.
        instances_NHW: masks of all instances, bool.
        kept: indices of the instances that the head is shown, in their order; the others are to be found unknown.
        stuff: number of stuff classes.
    """
    target = semantic_HW.to(torch.int64, copy=True)
    unknown = stuff + len(kept)
    target[(semantic_HW >= stuff) & (semantic_HW != VOID)] = unknown
    for mask in instances_NHW:
        target[mask] = unknown
    for position, number in enumerate(kept.tolist()):
        target[instances_NHW[number]] = stuff + position
    target[semantic_HW == VOID] = IGNORED  # masks of objects may reach there
    return target

"""UPSNet's semantic and panoptic heads against stored values, and by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from medseg3d.networks.detection.masks import paste_masks_in_image
from medseg3d.networks.detection.panoptic_head import (
    IGNORED,
    VOID,
    clean_up,
    panoptic_logits,
    panoptic_target,
    remove_overlaps,
)
from medseg3d.networks.detection.semantic_head import DeformableSemanticHead
from tests.parity.golden2d import Golden2d, check


def test_the_semantic_head_gives_the_stored_scores(shared):
    golden = Golden2d(shared("golden", "2d", "ops"), "upsnet_semantic_head")
    head = golden.fill(DeformableSemanticHead(12, 5, (12, 8, 8)))
    score = head([golden.tensor(name) for name in ("p2", "p3", "p4", "p5")])
    golden.check("score", score)
    upsampled = F.interpolate(score, scale_factor=4, mode="bilinear", align_corners=False)
    golden.check("upsampled", upsampled[..., ::2, ::2])


def test_the_semantic_head_takes_odd_sizes_and_begins_as_a_plain_convolution():
    head = DeformableSemanticHead(2, 3, (4,), levels=2)
    levels = [torch.randn(2, 2, 7, 9), torch.randn(2, 2, 4, 5)]
    assert head(levels).shape == (2, 3, 7, 9)
    plain = F.conv2d(levels[0], head.conv[0].weight, head.conv[0].bias, padding=1).relu()
    torch.testing.assert_close(head.subnet(levels[0]), plain)
    with pytest.raises(ValueError, match="takes 2 levels, finest first, got 1"):
        head(levels[:1])


@pytest.mark.parametrize("case", range(3))
def test_pruning_panoptic_logits_and_clean_up_are_those_stored(case, shared):
    folder = shared("golden", "2d", "equations")
    settings = json.loads((folder / "upsnet_head.json").read_text())["cases"][case]
    stored = np.load(folder / "upsnet_head.npz")
    semantic, boxes, scores, classes, masks = (
        torch.from_numpy(stored[f"case{case}_{name}"]) for name in ("sem", "boxes", "scores", "classes", "masks")
    )
    stuff = settings["n_stuff"]
    kept = remove_overlaps(boxes, scores, classes, masks, tuple(settings["hw"]))
    assert kept.tolist() == settings["keep"]
    logits = panoptic_logits(semantic, boxes[kept], classes[kept], masks[kept], stuff)
    check(logits[:stuff].numpy(), semantic[:stuff].numpy(), 0)
    check(logits[stuff:].numpy(), stored[f"case{case}_logits"], 1e-4)
    best = logits.topk(2, dim=0).values
    certain = (best[0] != best[1]).numpy()
    panoptic = logits.argmax(0)
    np.testing.assert_array_equal(panoptic.numpy()[certain], stored[f"case{case}_panoptic"][certain])
    # The rules are held on the stored map, so that a tie in the logits does not change the areas.
    found = clean_up(
        torch.from_numpy(stored[f"case{case}_panoptic"]).long(), semantic, classes[kept], stuff, settings["stuff_limit"]
    )
    np.testing.assert_array_equal(found.category_HW.numpy(), stored[f"case{case}_category"])
    np.testing.assert_array_equal(found.instance_HW.numpy(), stored[f"case{case}_instance"])


def test_the_target_of_training(shared):
    folder = shared("golden", "2d", "equations")
    stored = np.load(folder / "upsnet_head.npz")
    stuff = json.loads((folder / "upsnet_head.json").read_text())["train_n_stuff"]
    semantic, instances, kept = (torch.from_numpy(stored[f"train_{name}"]) for name in ("sem_gt", "inst", "kept"))
    target = panoptic_target(semantic, instances, kept, stuff)
    stored_target = np.where(stored["train_target"] == VOID, IGNORED, stored["train_target"])
    np.testing.assert_array_equal(target.numpy(), stored_target)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_void_is_ignored_where_objects_reach_into_it(dtype):
    semantic = torch.tensor([[0, 1, VOID, VOID]], dtype=dtype)
    objects = torch.tensor([[[False, True, True, False]], [[False, False, False, True]]])
    assert panoptic_target(semantic, objects, torch.tensor([0]), stuff=1).tolist() == [[0, 1, IGNORED, IGNORED]]


def test_every_one_of_many_objects_has_a_channel_of_its_own():
    """Channel 255 too, which is no void: an object's, or with 253 objects that of the unknown."""
    semantic, objects = torch.full((1, 300), 2), torch.eye(300, dtype=torch.bool)[:, None]
    for count in (300, 253):
        target = panoptic_target(semantic, objects, torch.arange(count), stuff=2)
        assert target.tolist() == [[2 + min(number, count) for number in range(300)]]
        assert (target != IGNORED).all()


def test_gradients_reach_semantic_and_mask_logits():
    semantic, masks = torch.randn(4, 8, 8, requires_grad=True), torch.randn(1, 5, 5, requires_grad=True)
    boxes = torch.tensor([[1.0, 1.0, 5.0, 6.0]])
    logits = panoptic_logits(semantic, boxes, torch.tensor([1]), masks, stuff=2)
    F.cross_entropy(logits[None], torch.full((1, 8, 8), 2)).backward()
    assert masks.grad.abs().min() > 0
    assert semantic.grad[3, 1:7, 1:6].abs().min() > 0
    assert torch.autograd.gradcheck(
        lambda a, b: panoptic_logits(a, boxes, torch.tensor([1]), b, 2), (semantic.double(), masks.double())
    )


def test_one_instance_by_hand():
    """Stuff 1; thing 0 has 3 everywhere, 2 in the box's mask: 5 within, 0 outside, unknown 3 outside and 0 within."""
    semantic = torch.stack([torch.full((4, 4), 1.0), torch.full((4, 4), 3.0)])
    logits = panoptic_logits(semantic, torch.tensor([[1, 1, 2, 2]]), torch.tensor([0]), torch.full((1, 3, 3), 2.0), 1)
    inside = torch.zeros(4, 4, dtype=torch.bool)
    inside[1:3, 1:3] = True
    torch.testing.assert_close(logits[1], torch.where(inside, 5.0, 0.0))
    torch.testing.assert_close(logits[2], torch.where(inside, 0.0, 3.0))


@pytest.mark.parametrize("box", [(1, -9, 4, -5), (-9, 1, -5, 4), (1, 9, 4, 12), (9, 1, 12, 4)])
def test_a_box_beside_the_image_explains_nothing(box):
    semantic = torch.full((2, 8, 8), 3.0)
    logits = panoptic_logits(semantic, torch.tensor([box]), torch.tensor([0]), torch.full((1, 3, 3), 2.0), stuff=1)
    assert (logits[1] == 0).all() and (logits[2] == 3).all()


@pytest.mark.parametrize(
    "box", [(-3, -2, 1, 1), (3, 2, 9, 9), (-5, -5, 20, 20), (2, 2, 2, 2), (9, 9, 12, 12), (3, 3, 1, 1)]
)
def test_masks_are_pasted_where_the_image_is(box):
    pasted = paste_masks_in_image(torch.ones(1, 3, 3), torch.tensor([box]), (6, 5), padding=0)[0]
    x0, y0, x1, y1 = box
    expected = torch.zeros(6, 5)
    expected[max(0, y0) : max(0, max(y0, y1) + 1), max(0, x0) : max(0, max(x0, x1) + 1)] = 1
    torch.testing.assert_close(pasted, expected)


def test_pruning_by_hand():
    boxes = torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 9], [0, 0, 9, 9], [5, 0, 14, 9]])
    scores, classes = torch.tensor([0.7, 0.9, 0.8, 0.6]), torch.tensor([0, 0, 1, 0])
    masks = torch.ones(4, 4, 4)
    # The first is hidden by the second, the third is of another class, half of the last is taken.
    assert remove_overlaps(boxes, scores, classes, masks, (10, 20)).tolist() == [1, 2]
    assert remove_overlaps(boxes, scores, classes, masks, (10, 20), most=0.5).tolist() == [1, 2, 3]
    assert remove_overlaps(boxes, scores, classes, -masks, (10, 20)).tolist() == []


def test_clean_up_by_hand():
    semantic = torch.zeros(3, 4, 4)
    semantic[0, :, :2], semantic[2, :, 2:] = 1, 1
    panoptic = torch.tensor([[0, 1, 2, 3]]).repeat(4, 1)  # stuff 0, two instances, unknown
    found = clean_up(panoptic, semantic, torch.tensor([1, 1]), stuff=1, least_stuff=4)
    assert found.category_HW[0].tolist() == [0, 0, 2, VOID]
    assert found.instance_HW[0].tolist() == [0, 0, 2, 0]
    assert clean_up(panoptic, semantic, torch.tensor([1, 1]), 1, least_stuff=9).category_HW[0, 0] == VOID


@pytest.mark.parametrize(
    ("classes", "masks", "stuff", "message"),
    [
        ([2], 1, 2, "classes count things from 0 to 1, got 2 to 2"),
        ([0], 2, 2, "one class and one mask a box: got 1, 1 and 2"),
        ([0], 1, 4, "stuff is the number of stuff classes, 0 to 3 of 4, got 4"),
    ],
)
def test_what_does_not_fit_is_refused(classes, masks, stuff, message):
    with pytest.raises(ValueError, match=message):
        panoptic_logits(torch.zeros(4, 5, 5), torch.zeros(1, 4), torch.tensor(classes), torch.zeros(masks, 3, 3), stuff)

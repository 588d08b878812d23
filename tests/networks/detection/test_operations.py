"""Operations of detectors against their definitions, on cases that reference files do not hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg3d.networks.detection import nms as nms_module
from medseg3d.networks.detection.anchors import AnchorGenerator
from medseg3d.networks.detection.boxes import BoxCoder, box_convert, box_iou, clip_boxes_to_image, masks_to_boxes
from medseg3d.networks.detection.masks import paste_masks_in_image, project_masks_on_boxes
from medseg3d.networks.detection.matching import BACKGROUND, BalancedSampler, Matcher
from medseg3d.networks.detection.nms import batched_nms, nms
from medseg3d.networks.detection.roi_align import MultiScaleRoIAlign, roi_align


def some_boxes(count, seed, low=-30, high=130):
    corners = low + (high - low) * torch.rand(count, 2, 2, generator=torch.Generator().manual_seed(seed))
    return torch.cat([corners.amin(1), corners.amax(1)], 1)


def greedy(boxes, scores, threshold, inclusive=False):
    """The definition, box by box, in Python's own numbers."""
    iou = box_iou(boxes, boxes, inclusive).tolist()
    left, keep = scores.argsort(descending=True, stable=True).tolist(), []
    while left:
        best, *left = left
        keep.append(best)
        left = [i for i in left if not iou[best][i] > threshold]
    return keep


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(0, 60),
    seed=st.integers(0, 999),
    threshold=st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7, 1.0]),
    whole=st.booleans(),
    inclusive=st.booleans(),
)
def test_nms_is_the_greedy_definition(count, seed, threshold, whole, inclusive):
    boxes = some_boxes(count, seed, high=20 if whole else 130)
    boxes = boxes.round() if whole else boxes
    scores = torch.rand(count, generator=torch.Generator().manual_seed(seed)).mul(9).round()
    assert nms(boxes, scores, threshold, inclusive=inclusive).tolist() == greedy(boxes, scores, threshold, inclusive)


def test_nms_over_many_blocks():
    """A chain in which every box overlaps the next one: every second box stays."""
    count = 3 * nms_module.BLOCK + 7
    boxes = torch.arange(count)[:, None] * torch.tensor([1.0, 0, 1, 0]) + torch.tensor([0.0, 0, 3, 10])
    scores = torch.arange(count, 0, -1).float()
    assert nms(boxes, scores, 0.4).tolist() == list(range(0, count, 2))
    crowd = some_boxes(count, 0, high=60)
    assert nms(crowd, scores, 0.3).tolist() == greedy(crowd, scores, 0.3)


def test_an_iou_equal_to_the_threshold_stays_whatever_the_rounding_of_the_threshold():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 3]])
    scores = torch.tensor([1.0, 0.5])
    iou = box_iou(boxes, boxes)[0, 1].item()  # float32 of 0.3, which is above 0.3
    assert iou > 0.3
    assert nms(boxes, scores, iou).tolist() == [0, 1]
    assert nms(boxes, scores, 0.3).tolist() == [0]


@pytest.mark.parametrize("count", [40, 700])
@pytest.mark.parametrize("groups", [1, 3, 40])
def test_groups_do_not_meet(count, groups):
    boxes = some_boxes(count, 1, low=-1e4, high=-9.9e3)
    scores = torch.rand(count, generator=torch.Generator().manual_seed(2))
    which = torch.arange(count) % groups - 1
    keep = batched_nms(boxes, scores, which, 0.5)
    assert torch.equal(scores[keep], scores[keep].sort(descending=True)[0])
    for group in which.unique():
        members = torch.where(which == group)[0]
        alone = members[greedy(boxes[members], scores[members], 0.5)]
        assert torch.equal(keep[which[keep] == group], alone)


def test_boxes_that_are_no_boxes():
    with pytest.raises(ValueError, match=r"boxes must be \(N, 4\), got a shape of \(3, 5\)"):
        nms(torch.zeros(3, 5), torch.zeros(3), 0.5)
    with pytest.raises(ValueError, match=r"scores must be \(3,\)"):
        nms(torch.zeros(3, 4), torch.zeros(2), 0.5)
    with pytest.raises(ValueError, match="formats of boxes are xyxy, xywh, cxcywh"):
        box_convert(torch.zeros(1, 4), "xyxy", "yxyx")


@pytest.mark.parametrize("inclusive", [False, True])
def test_a_coder_brings_boxes_back(inclusive):
    targets, boxes = some_boxes(20, 3) + torch.tensor([0.0, 0, 1, 1]), some_boxes(20, 4) + torch.tensor([0.0, 0, 9, 9])
    coder = BoxCoder((10, 10, 5, 5), largest_scale=20, inclusive=inclusive)
    again = coder.decode(coder.encode(targets, boxes), boxes)
    torch.testing.assert_close(again[:, 0], targets, rtol=1e-4, atol=1e-3)


def test_the_last_pixel_is_in_an_inclusive_box():
    one_pixel = torch.tensor([[3.0, 4, 3, 4]])
    assert box_iou(one_pixel, one_pixel, inclusive=True).item() == 1
    assert box_iou(one_pixel, one_pixel).isnan().all()
    assert clip_boxes_to_image(torch.tensor([[-5.0, 2, 40, 50]]), (20, 30), inclusive=True).tolist() == [[0, 2, 29, 19]]
    assert clip_boxes_to_image(torch.tensor([[-5.0, 2, 40, 50]]), (20, 30)).tolist() == [[0, 2, 30, 20]]


def test_boxes_of_masks():
    masks = torch.zeros(3, 6, 8, dtype=torch.bool)
    masks[0, 2:4, 1:7] = True
    masks[2, 5, 7] = True
    assert masks_to_boxes(masks).tolist() == [[1, 2, 6, 3], [0, 0, 0, 0], [7, 5, 7, 5]]


# RoIAlign


def test_the_mean_of_a_linear_map_is_its_value_at_the_centre():
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(32.0), indexing="ij")
    feature = torch.stack((2 * x + 1, 3 * y - x))[None]
    box = torch.tensor([[0.0, 4, 6, 18, 13]])
    for ratio in (-1, 1, 2, 5):
        pooled = roi_align(feature, box, (7, 2), sampling_ratio=ratio, aligned=True)[0]
        centre_x, centre_y = 4 + 14 * (torch.arange(2) + 0.5) / 2 - 0.5, 6 + 7 * (torch.arange(7) + 0.5) / 7 - 0.5
        torch.testing.assert_close(pooled[0], (2 * centre_x + 1).expand(7, 2))
        torch.testing.assert_close(pooled[1], 3 * centre_y[:, None] - centre_x)


@pytest.mark.parametrize(("ratio", "aligned"), [(2, False), (0, True)])
def test_gradcheck_of_roi_align(ratio, aligned):
    feature = torch.randn(2, 3, 6, 7, dtype=torch.float64, requires_grad=True)
    boxes = torch.cat((torch.tensor([[0.0], [1], [1]]), some_boxes(3, 5, -2, 9)), 1).double()
    assert torch.autograd.gradcheck(lambda x: roi_align(x, boxes, (2, 3), 0.7, ratio, aligned), feature)


def test_regions_in_pieces_are_the_same(monkeypatch):
    feature, boxes = torch.randn(1, 4, 20, 20), [some_boxes(30, 6)]
    whole = {ratio: roi_align(feature, boxes, 5, 0.3, ratio) for ratio in (0, 2)}
    monkeypatch.setattr("medseg3d.networks.detection.roi_align.LOOKUPS", 1000)
    for ratio, pooled in whole.items():
        torch.testing.assert_close(roi_align(feature, boxes, 5, 0.3, ratio), pooled, rtol=0, atol=0)


def test_no_regions_and_regions_of_nothing():
    feature = torch.randn(2, 3, 8, 8, requires_grad=True)
    for ratio in (0, 2):
        assert roi_align(feature, [torch.zeros(0, 4)] * 2, (2, 5), 1.0, ratio).shape == (0, 3, 2, 5)
        far = roi_align(feature, [torch.tensor([[100.0, 100, 120, 130]]), torch.zeros(0, 4)], 2, 1.0, ratio)
        assert not far.any()
        not_a_number = roi_align(feature, [torch.full((1, 4), float("nan"))] * 2, 2, 1.0, ratio)
        assert not not_a_number.any()
    inverted = roi_align(feature, [torch.tensor([[6.0, 6, 2, 2]])] * 2, 2, 1.0, 0, aligned=True)
    assert not inverted.any()


def test_half_precision_maps_are_pooled_in_full_precision():
    feature, boxes = torch.randn(1, 4, 20, 20).bfloat16(), [some_boxes(10, 7)]
    pooled = roi_align(feature, boxes, 3, 0.3, 2)
    assert pooled.dtype == torch.bfloat16
    assert torch.equal(pooled, roi_align(feature.float(), boxes, 3, 0.3, 2).bfloat16())


def test_a_pyramid_is_its_levels():
    maps = {str(i): torch.randn(2, 3, 64 >> i, 48 >> i) for i in range(4)}
    boxes = [some_boxes(15, 8, 0, 250), some_boxes(9, 9, 0, 40)]
    pool = MultiScaleRoIAlign(list(maps), 4, 2, canonical_scale=56)
    pooled = pool(maps, boxes, [(256, 192)] * 2)
    levels = pool.levels(torch.cat(boxes), [0.25, 0.125, 0.0625, 0.03125])
    assert set(levels.tolist()) == {0, 1, 2, 3}
    rois = torch.cat([torch.cat((torch.full((len(b), 1), i), b), 1) for i, b in enumerate(boxes)])
    for i in range(4):
        alone = roi_align(maps[str(i)], rois[levels == i], 4, 0.25 / 2**i, 2)
        torch.testing.assert_close(pooled[levels == i], alone)


def test_regions_of_images_that_there_are_not():
    with pytest.raises(ValueError, match="the boxes name images 2 to 2, there are maps of images 0 to 1"):
        roi_align(torch.zeros(2, 1, 4, 4), torch.tensor([[2.0, 0, 0, 1, 1]]), 2)
    with pytest.raises(ValueError, match=r"boxes must be \(R, 5\)"):
        roi_align(torch.zeros(2, 1, 4, 4), torch.zeros(1, 4), 2)
    with pytest.raises(ValueError, match="none of the maps 0, 1 is there, but pool"):
        MultiScaleRoIAlign(["0", "1"], 2)({"pool": torch.zeros(1, 1, 4, 4)}, [torch.zeros(0, 4)], [(4, 4)])


# Matching, anchors, masks


def test_an_object_that_nothing_overlaps_matches_nothing():
    iou = torch.tensor([[0.0, 0, 0, 0], [0.2, 0.1, 0.2, 0]])
    assert Matcher(0.7, 0.3, allow_low_quality_matches=True)(iou).tolist() == [1, BACKGROUND, 1, BACKGROUND]
    assert Matcher(0.7, 0.3)(torch.zeros(0, 3)).tolist() == [BACKGROUND] * 3
    with pytest.raises(ValueError, match=r"got 0\.8 and 0\.7"):
        Matcher(0.7, 0.8)


def test_a_sampler_fills_up_with_background():
    labels = torch.tensor([1, 0, -1, 2, 0, 0, 3, 0])
    for _ in range(5):
        objects, background = BalancedSampler(6, 0.34)(labels)
        assert (labels[objects] > 0).all() and (labels[background] == 0).all()
        assert (len(objects.unique()), len(background.unique())) == (2, 4)
    assert [len(part) for part in BalancedSampler(512, 0.25)(labels)] == [3, 4]
    assert [len(part) for part in BalancedSampler(4, 0.5)(torch.zeros(0))] == [0, 0]


def test_anchors_need_sizes_for_every_map():
    generator = AnchorGenerator((8, 16), (0.5, 2))
    assert generator.num_anchors_per_location() == [2, 2]
    with pytest.raises(ValueError, match="sizes for 2 maps, the backbone gives 1"):
        generator([torch.zeros(1, 1, 4, 4)], (32, 32))
    with pytest.raises(ValueError, match="give both for every map"):
        AnchorGenerator((8, 16), ((1.0,),))
    with pytest.raises(ValueError, match="sizes and ratios are positive"):
        AnchorGenerator((8, 0))


@pytest.mark.parametrize(
    "box", [[-50.0, -40, -20, -10], [90, 90, 1e6, 1e6], [-1e5, -1e5, 1e5, 1e5], [3.5, 4.5, 3.5, 4.5]]
)
def test_boxes_of_any_place_and_size_are_pasted(box):
    pasted = paste_masks_in_image(torch.ones(1, 1, 28, 28), torch.tensor([box]), (20, 30))
    assert pasted.shape == (1, 20, 30)
    inside = int(max(0, min(30, box[2]) - max(0, box[0]))) * int(max(0, min(20, box[3]) - max(0, box[1])))
    assert (pasted > 0.5).sum() >= inside
    assert torch.equal(
        paste_masks_in_image(torch.ones(1, 28, 28), torch.tensor([box]), (20, 30), threshold=0.5)[0], pasted[0] > 0.5
    )


def test_a_mask_comes_back_from_the_frame_of_its_box():
    mask = torch.zeros(1, 40, 50, dtype=torch.uint8)
    mask[:, 10:30, 5:45] = 1
    box = torch.tensor([[5.0, 10, 45, 30]])
    target = project_masks_on_boxes(mask, box, torch.tensor([0]), 28)
    back = paste_masks_in_image(target, box, (40, 50), threshold=0.5)
    assert (back != mask.bool()).sum() <= 2 * (40 + 20)  # its rim
    assert project_masks_on_boxes(mask, torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), 28).shape == (0, 28, 28)


def test_a_one_pixel_mask_and_regions_beyond_the_image():
    mask = torch.zeros(2, 9, 9, dtype=torch.bool)
    mask[1, 4, 6] = True
    boxes = torch.tensor([[6.0, 4, 7, 5], [-20, -20, -10, -10], [4, 4, 40, 40]])
    by_roi_align = roi_align(mask[[1]][:, None].float(), [boxes], 28, 1.0, -1)[:, 0]
    torch.testing.assert_close(project_masks_on_boxes(mask, boxes, torch.tensor([1, 1, 1]), 28), by_roi_align)
    assert by_roi_align[0, 0, 0] > 0.9 and not by_roi_align[1].any()

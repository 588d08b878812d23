from __future__ import annotations

import math

import numpy as np
import pytest

from medseg3d.metrics import (
    CocoPrecision,
    CocoRules,
    Confusion,
    ObjectCounts,
    PanopticQuality,
    VocPrecision,
    object_counts,
    pairwise_iou,
    seg_measure,
)
from medseg3d.tasks import Instances, Panoptic, Segment

SHAPE = (60, 80)


def boxes(*rows, scores=None, classes=None, crowd=None, shape=SHAPE):
    return Instances.from_boxes(rows, shape, scores=scores, classes=classes, crowd=crowd)


def test_iou_of_boxes_by_hand():
    rows = boxes((0, 0, 10, 10), (5, 5, 15, 15), (3, 3, 3, 9))
    columns = boxes((0, 0, 10, 10), (6, 6, 8, 8), (3, 3, 3, 9))
    np.testing.assert_allclose(pairwise_iou(rows, columns, "boxes"), [[1, 0.04, 0], [25 / 175, 0.04, 0], [0, 0, 0]])
    np.testing.assert_allclose(pairwise_iou(rows, columns, "boxes"), pairwise_iou(rows, columns, "masks"))
    crowd = boxes((0, 0, 20, 20), crowd=[True])
    np.testing.assert_allclose(pairwise_iou(rows, crowd, "boxes", crowd=True)[:2], 1)
    touching = boxes((0, 0, 9, 9)), boxes((9, 0, 18, 9))
    assert pairwise_iou(*touching, "boxes") == 0
    assert pairwise_iou(*touching, "boxes", inclusive=True) == pytest.approx(10 / 190)


def test_iou_in_three_dimensions_and_of_boxes_beyond_the_image():
    shape = (10, 12, 14)
    a = Instances.from_boxes([(0, 0, 0, 4, 4, 4)], shape)
    b = Instances.from_boxes([(2, 0, 0, 6, 4, 4)], shape)
    assert pairwise_iou(a, b) == pairwise_iou(a, b, "boxes") == pytest.approx(2 / 6)
    assert a.regions[0].mask(shape)[:4, :4, :4].all() and a.regions[0].area == 64
    beyond = boxes((-10, -10, 5, 5), (100, 100, 120, 130))
    assert [region.area for region in beyond.regions] == [25, 0]
    np.testing.assert_array_equal(beyond.areas, [225, 600])


def test_objects_are_paired_within_their_class_and_as_many_as_can_be():
    # Both predictions overlap the left object; only one of them also fits the right one.
    reference = boxes((0, 0, 10, 10), (8, 0, 18, 10))
    prediction = boxes((0, 0, 10, 9), (4, 0, 14, 10))
    at = object_counts(prediction, reference, (0.4, 0.5, 0.95))
    assert (at[0.4].found, at[0.4].false_alarms, at[0.4].missed) == (2, 0, 0)
    assert (at[0.5].found, at[0.5].false_alarms, at[0.5].missed) == (1, 1, 1)
    assert at[0.95] == ObjectCounts(0, 2, 2)
    assert at[0.5].precision == at[0.5].recall == at[0.5].f1 == 0.5
    assert at[0.5].threat_score == pytest.approx(1 / 3)
    other = boxes((0, 0, 10, 10), (8, 0, 18, 10), classes=[2, 2])
    assert ObjectCounts.of(prediction, other, 0.4) == ObjectCounts(0, 2, 2)
    assert ObjectCounts.of(prediction, other, 0.4, classes=False).found == 2


def test_a_pair_more_outweighs_a_better_fit():
    reference = boxes((0, 0, 10, 1), (0, 0, 30, 1), (25, 0, 39, 1))
    prediction = boxes((0, 0, 10, 1), (0, 0, 30, 1), (24, 0, 26, 1))
    assert ObjectCounts.of(prediction, reference, 0.05).found == 3


def test_crowds_are_neither_found_nor_missed():
    reference = boxes((0, 0, 10, 10), (20, 0, 60, 40), crowd=[False, True])
    prediction = boxes((0, 0, 10, 10), (22, 2, 30, 10), (30, 20, 40, 30), (0, 40, 10, 50))
    assert ObjectCounts.of(prediction, reference) == ObjectCounts(1, 1, 0)


def test_nothing_predicted_and_nothing_to_find():
    none, one = boxes(), boxes((0, 0, 1, 1))
    assert ObjectCounts.of(none, one) == ObjectCounts(0, 0, 1)
    assert ObjectCounts.of(one, none) == ObjectCounts(0, 1, 0)
    assert math.isnan(ObjectCounts.of(none, none).f1)
    assert ObjectCounts.of(one, one) == ObjectCounts(1, 0, 0), "a mask of one pixel"
    assert math.isnan(seg_measure(one, none)) and seg_measure(none, one) == 0
    for measure in (CocoPrecision.of(none, none), CocoPrecision.of(one, none)):
        assert all(math.isnan(value) for value in measure.summary().values())
    missed = CocoPrecision.of(none, one).summary()
    assert missed["AP"] == missed["AR100"] == missed["APs"] == 0 and math.isnan(missed["APl"])


def test_seg_of_the_cell_tracking_challenge():
    reference = boxes((0, 0, 10, 10), (20, 0, 30, 10), (40, 0, 50, 10))
    # One that holds all of the first and as much beside; half of the second, which is not more than half; none.
    prediction = boxes((0, 0, 10, 20), (20, 0, 25, 10))
    assert seg_measure(prediction, reference) == pytest.approx((0.5 + 0 + 0) / 3)
    assert seg_measure(reference, reference) == 1


def test_average_precision_by_hand():
    """Three objects; by rank hit, miss, hit: recall 1/3, 1/3, 2/3 at precision 1, 1/2, 2/3."""
    reference = boxes((0, 0, 10, 10), (20, 0, 30, 10), (40, 0, 50, 10))
    prediction = boxes((0, 0, 10, 10), (60, 40, 70, 50), (20, 0, 30, 10), scores=[0.9, 0.8, 0.7])
    coco = CocoPrecision.of(prediction, reference)
    steps = [1] * 34 + [2 / 3] * 33 + [0] * 34  # of 101 recalls: up to 0.33, up to 0.66, beyond
    assert coco.average_precision(0.5) == pytest.approx(np.mean(steps))
    assert coco.average_recall() == pytest.approx(2 / 3) and coco.average_recall(1) == pytest.approx(1 / 3)
    voc = VocPrecision.of(prediction, reference)
    assert voc.average_precision(1) == pytest.approx(1 / 3 + 1 / 3 * 2 / 3)
    assert voc.average_precision(1, points=11) == pytest.approx((4 * 1 + 3 * 2 / 3) / 11)
    assert voc.mean_average_precision() == voc.average_precision(1)
    assert math.isnan(voc.average_precision(5))


def test_what_average_precision_refuses():
    one = boxes((0, 0, 10, 10), (20, 0, 30, 10))
    with pytest.raises(ValueError, match=r"limit of detections is one of \(1, 10, 100\), got 5"):
        CocoPrecision.of(one, one).average_recall(limit=5)
    unknown = boxes((0, 0, 10, 10), (20, 0, 30, 10), scores=[0.5, math.nan])
    for precision in (CocoPrecision, VocPrecision):
        with pytest.raises(ValueError, match="got NaN as score 1"):
            precision.of(unknown, one)


def test_boxes_that_are_none_are_refused():
    with pytest.raises(ValueError, match=r"boxes are finite numbers, box 1 is \[0.0, nan, 10.0, 10.0\]"):
        boxes((0, 0, 10, 10), (0, math.nan, 10, 10))
    for box in ((30, 20, 10, 40), (30, 20, 40, 10)):
        with pytest.raises(ValueError, match=r"box 0 is .*; boxes \(x, y, width, height\) become \(x, y, x \+ width"):
            boxes(box)


def test_counts_add_up_by_sum():
    """Which begins with 0, and with nothing else."""
    one, other = boxes((0, 0, 10, 10)), boxes((0, 0, 10, 8), (20, 0, 30, 10))
    maps = np.array([[0, 1], [1, 1]]), np.array([[0, 1], [0, 1]])
    panoptic = Panoptic(np.ones((4, 5), int), {1: Segment(2)}, {2: "a"})
    for parts in (
        [ObjectCounts.of(one, one), ObjectCounts.of(one, other)],
        [CocoPrecision.of(one, one), CocoPrecision.of(one, other)],
        [VocPrecision.of(one, one), VocPrecision.of(one, other)],
        [PanopticQuality.of(panoptic, panoptic)] * 2,
        [Confusion.of(*maps, 2), Confusion.of(*maps[::-1], 2)],
    ):
        assert str(sum(parts)) == str(parts[0] + parts[1]) != str(parts[0])
        with pytest.raises(TypeError):
            1 + parts[0]


def test_a_summary_tells_what_its_rules_have():
    one = Instances.from_boxes([(0, 0, 4, 4)], (8, 8))
    rules = CocoRules(thresholds=(0.5,), areas={"all": (0, 1e10), "tiny": (0, 16), "large": (17, 1e10)})
    found = CocoPrecision.of(one, one, rules=rules).summary()
    assert list(found) == ["AP", "AP50", "AP_tiny", "APl", "AR1", "AR10", "AR100", "AR_tiny", "ARl"]
    assert found["AP_tiny"] == found["AP50"] == pytest.approx(1) and math.isnan(found["APl"])


def test_voc_gives_no_second_choice_and_ignores_the_difficult():
    reference = boxes((0, 0, 10, 10), (1, 0, 11, 10), (40, 0, 50, 10), crowd=[False, False, True])
    # The second is nearest to the first object, which is taken, although it overlaps the other one as well.
    prediction = boxes((0, 0, 10, 10), (0, 1, 10, 10), (40, 0, 50, 10), scores=[0.9, 0.8, 0.7])
    voc = VocPrecision.of(prediction, reference)
    assert voc.average_precision(1) == pytest.approx(0.5)
    assert CocoPrecision.of(prediction, reference).average_precision(0.5) == pytest.approx(1.0)
    duplicate = boxes((0, 0, 10, 10), (0, 0, 10, 10), scores=[0.9, 0.8])
    once = boxes((0, 0, 10, 10))
    assert VocPrecision.of(duplicate, once).average_precision(1) == 1, "recall is full before the duplicate"
    later = VocPrecision.of(boxes((0, 0, 10, 10), scores=[0.7]), once)
    assert (VocPrecision.of(duplicate, once) + later).average_precision(1) == pytest.approx(0.5 + 0.5 * 2 / 3)


def test_scans_are_measured_like_images():
    shape = (20, 40, 50)
    corners = np.array([(0, 0, 0), (20, 20, 5), (40, 0, 10)])
    reference = Instances.from_boxes(np.hstack([corners, corners + 8]), shape)
    shifted = corners + np.array([(0, 0, 0), (0, 0, 2), (0, 9, 0)])  # IoU 1, 6 / 10 and 0
    prediction = Instances.from_boxes(np.hstack([shifted, shifted + 8]), shape, scores=[0.9, 0.8, 0.7])
    assert ObjectCounts.of(prediction, reference) == ObjectCounts(2, 1, 1)
    for geometry in ("masks", "boxes"):
        coco = CocoPrecision.of(prediction, reference, geometry)
        assert coco.average_precision(0.6) == pytest.approx(67 / 101)
        assert coco.average_precision(0.65) == pytest.approx(34 / 101)
        assert coco.average_recall() == pytest.approx((3 * 2 + 7) / 30)
    voxels = CocoRules(areas={"all": (0, 1e10), "lesion": (512, 512)})
    assert CocoPrecision.of(prediction, reference, rules=voxels).average_precision(0.5, "lesion") == pytest.approx(
        67 / 101
    )


def test_images_add_up_in_any_grouping():
    rng = np.random.default_rng(4)
    pairs = []
    for _ in range(4):
        corner = rng.integers(0, 40, (6, 2))
        reference = boxes(*np.hstack([corner, corner + 12]), classes=rng.integers(1, 3, 6))
        moved = corner + rng.integers(-2, 3, (6, 2))
        prediction = boxes(*np.hstack([moved, moved + 12]), classes=reference.classes, scores=rng.random(6))
        pairs.append((prediction, reference))
    whole = CocoPrecision.over(pairs)
    halves = CocoPrecision.over(pairs[:1]) + CocoPrecision.over(pairs[1:])
    assert 0 < whole.average_precision() < 1
    assert halves.summary() == pytest.approx(whole.summary(), nan_ok=True)
    assert sum((ObjectCounts.of(p, r) for p, r in pairs), ObjectCounts()).found <= 24
    with pytest.raises(ValueError, match="same rules"):
        CocoPrecision.over(pairs, rules=CocoRules(thresholds=(0.5,))) + whole


def test_refusals():
    one = boxes((0, 0, 1, 1))
    with pytest.raises(ValueError, match="one image"):
        pairwise_iou(one, boxes((0, 0, 1, 1), shape=(5, 5)))
    with pytest.raises(ValueError, match="'masks' or 'boxes'"):
        pairwise_iou(one, one, "circles")
    with pytest.raises(ValueError, match="threshold"):
        ObjectCounts.of(one, one, 0)
    measured = CocoPrecision.of(one, one)
    for wrong in ({"threshold": 0.51}, {"area": "tiny"}, {"category": 9}):
        with pytest.raises(ValueError, match="is one of"):
            measured.average_precision(**wrong)


def test_panoptic_segments_without_a_pixel_and_an_empty_image():
    image = np.zeros((4, 5), int)
    image[0, 0] = 7
    one_pixel = Panoptic(image, {7: Segment(1)}, {1: "cell", 2: "nerve"})
    assert PanopticQuality.of(one_pixel, one_pixel).all.pq == 1
    claimed = Panoptic(image, {7: Segment(1), 9: Segment(1)}, {1: "cell", 2: "nerve"})
    assert PanopticQuality.of(claimed, one_pixel).counts[1].fp == 1
    assert PanopticQuality.of(one_pixel, claimed).counts[1].fn == 1
    nothing = Panoptic(np.zeros((4, 5), int), {})
    assert math.isnan(PanopticQuality.of(nothing, nothing).all.pq)
    assert PanopticQuality.of(nothing, one_pixel).all.pq == 0
    with pytest.raises(ValueError, match="one grid"):
        PanopticQuality.of(nothing, Panoptic(np.zeros((5, 4), int), {}))

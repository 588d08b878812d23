from __future__ import annotations

import math
import tracemalloc
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest

from medseg3d.metrics import Confusion, ObjectCounts, PanopticQuality, dice, iou
from medseg3d.metrics.counting import joint_counts
from medseg3d.tasks import Category, SemanticMap, instances_from_semantic, panoptic_from_semantic

# The worked example of a course: five cells on 16 x 16 pixels; every pixel count is the same in both predictions.
REFERENCE = """
................
.aaa......bbbb..
.aaa......bbbb..
.aaa............
................
......ccc.......
......ccc.......
......ccc.......
................
.ddd.......eeee.
.ddd.......eee..
.ddd.......eee..
................
................
................
................"""
ALL_FOUND = """
.x..............
.aaa.....xbbbb..
.aaa......bb....
..a.............
................
.....xccc.......
......ccc.......
......cc........
................
xddd......xeeee.
.ddd.......eee..
xd.........ee...
...........x....
................
................
................"""
ONE_MISSED = """
................
.aaa............
.aaa............
.aaa............
................
......ccc.......
......ccc.......
......ccc.......
................
.ddd.......eeee.
.ddd.......eee..
.ddd.......eee..
................
.....xxxx.......
.....xxx........
................"""


def drawn(picture):
    return np.array([[character != "." for character in line] for line in picture.split()]).astype(np.uint8)


@pytest.mark.parametrize(("prediction", "objects"), [(ALL_FOUND, (5, 0, 0)), (ONE_MISSED, (4, 1, 1))])
def test_the_worked_example_that_only_objects_tell_apart(prediction, objects):
    prediction, reference = drawn(prediction), drawn(REFERENCE)
    counts = Confusion.of(prediction, reference, 2)
    cell = [int(getattr(counts, name)[1]) for name in ("true_positives", "false_positives", "false_negatives")]
    assert [*cell, int(counts.true_negatives[1])] == [37, 7, 8, 204]
    assert round(100 * counts.accuracy, 2) == 94.14
    assert round(100 * counts.iou[1], 2) == 71.15
    assert round(100 * counts.precision[1], 2) == 84.09
    assert round(100 * counts.recall[1], 2) == 82.22
    # The course's 83.14 % follows from the two rounded numbers; the pixels give 74 / 89.
    assert round(2 * 84.09 * 82.22 / (84.09 + 82.22), 2) == 83.14
    assert counts.f1[1] == counts.dice[1] == pytest.approx(74 / 89)
    assert 100 * counts.f1[1] == pytest.approx(83.14, abs=0.01)

    sides = [instances_from_semantic(SemanticMap(side, {1: "cell"})) for side in (prediction, reference)]
    found = ObjectCounts.of(*sides)
    assert (found.found, found.false_alarms, found.missed) == objects
    assert found.f1 == 2 * objects[0] / (2 * objects[0] + objects[1] + objects[2])
    categories = {0: Category("background", is_thing=False), 1: "cell"}
    panoptic = [panoptic_from_semantic(SemanticMap(side, categories)) for side in (prediction, reference)]
    assert PanopticQuality.of(*panoptic).things.rq == pytest.approx(found.f1)


def test_several_classes_by_hand():
    reference = np.array([[0, 0, 0, 0], [1, 1, 1, 2], [2, 2, 2, 255]])
    prediction = np.array([[0, 0, 1, 1], [1, 1, 0, 2], [2, 1, 255, 3]])
    counts = Confusion.of(prediction, reference, classes=5)
    np.testing.assert_array_equal(counts.counts[:3, :3], [[2, 2, 0], [1, 2, 0], [0, 1, 2]])
    np.testing.assert_array_equal(counts.counts[:, -1], [0, 0, 1, 0, 0], err_msg="no class given: a miss")
    assert counts.total == 11, "void in the reference is not counted"
    np.testing.assert_allclose(counts.recall, [2 / 4, 2 / 3, 2 / 4, np.nan, np.nan])
    np.testing.assert_allclose(counts.precision, [2 / 3, 2 / 5, 1, np.nan, np.nan])
    np.testing.assert_allclose(counts.iou, [2 / 5, 2 / 6, 2 / 4, np.nan, np.nan])
    np.testing.assert_allclose(counts.specificity[:3], [6 / 7, 5 / 8, 1])
    assert counts.accuracy == pytest.approx(6 / 11)
    assert counts.mean_accuracy == pytest.approx(np.mean([2 / 4, 2 / 3, 2 / 4]))
    assert counts.mean_iou == pytest.approx(np.mean([2 / 5, 2 / 6, 2 / 4]))
    assert counts.mean_dice == pytest.approx(np.mean([4 / 7, 4 / 8, 4 / 6]))
    assert counts.frequency_weighted_iou == pytest.approx((4 * 2 / 5 + 3 * 2 / 6 + 4 * 2 / 4) / 11)


def test_void_below_the_number_of_classes_by_hand():
    reference = np.array([0, 0, 0, 1, 1, 1, 2, 2, 255])
    prediction = np.array([0, 1, 2, 1, 0, 2, 2, 255, 1])
    counts = Confusion.of(prediction, reference, classes=3, void=[0, 255, 0])
    np.testing.assert_array_equal(counts.counts, [[0, 0, 0, 0], [0, 1, 1, 1], [0, 0, 1, 1]])
    assert counts.total == 5, "void in the reference is not counted, whatever was predicted there"
    np.testing.assert_allclose(counts.iou, [np.nan, 1 / 3, 1 / 3])
    only_zero = Confusion.of(prediction[:7], reference[:7], classes=3, void=0)
    np.testing.assert_array_equal(only_zero.counts, [[0, 0, 0, 0], [0, 1, 1, 1], [0, 0, 1, 0]])
    with pytest.raises(ValueError, match=r"the reference has 1 voxels that .* nor void \(\[0\]\)"):
        Confusion.of(prediction, reference, classes=3, void=0)


@pytest.mark.parametrize("order", ["C", "F", "sliced"])
@pytest.mark.parametrize("shape", [(40, 51), (9, 30, 17)])
def test_agrees_with_the_measures_of_masks_in_two_and_three_dimensions(shape, order):
    rng = np.random.default_rng(1)
    p, r = rng.integers(0, 4, (2, *shape)).astype(np.uint8)
    p, r = {"C": (p, r), "F": (np.asfortranarray(p), r.copy("F")), "sliced": (p[::2], r[::2])}[order]
    counts = Confusion.of(p, r, 4)
    np.testing.assert_allclose(counts.iou[1:], list(iou(p, r, [1, 2, 3]).values()))
    np.testing.assert_allclose(counts.dice[1:], list(dice(p, r, [1, 2, 3]).values()))
    assert counts.accuracy == (p == r).mean()


def test_a_data_set_and_several_processes_give_the_same_as_one_count():
    rng = np.random.default_rng(2)
    pairs = [rng.integers(0, 3, (2, 20, n)) for n in (5, 8, 13)]
    whole = Confusion.of(*np.concatenate(pairs, axis=2), 3)
    summed = sum((Confusion.of(p, r, 3) for p, r in pairs), Confusion.zeros(3))
    np.testing.assert_array_equal(summed.counts, whole.counts)
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        parts = list(pool.map(Confusion.of, *zip(*pairs, strict=True), [3] * 3))
    np.testing.assert_array_equal(sum(parts, Confusion.zeros(3)).counts, whole.counts)
    # What an all-reduce leaves on each process:
    reduced = Confusion(np.sum([part.counts for part in parts], axis=0))
    assert reduced.mean_iou == whole.mean_iou


def test_no_one_hot_memory():
    shape = (160, 200, 200)
    prediction = np.random.default_rng(3).integers(0, 100, shape, np.uint8)
    tracemalloc.start()
    counts = Confusion.of(prediction, prediction, 100)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert counts.accuracy == 1
    one_hot = prediction.size * 100
    assert peak < one_hot / 10


def test_large_class_numbers_and_unsigned_types_do_not_wrap():
    reference = np.array([[200, 254]], np.uint8)
    counts = Confusion.of(np.array([[200, 200]], np.uint8), reference, 255)
    assert counts.counts[254, 200] == counts.counts[200, 200] == 1
    assert Confusion.of(reference, reference, 300).counts[254, 254] == 1, "255 is a class here, not void"
    assert Confusion.of(reference + np.uint8(1), reference, 300, [255]).counts.sum(axis=0)[-1] == 1, "unless asked for"
    numbers = [70000, -3, 1 << 40]
    counted = joint_counts(np.array([70000, -3, 5, 5]), np.array([1 << 40, -3, 70000, 6]), numbers, numbers)
    np.testing.assert_array_equal(counted, [[0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 1]])


def test_empty_images_and_masks():
    nothing = Confusion.of(np.zeros((0, 5), int), np.zeros((0, 5), int), 2)
    assert nothing.total == 0
    assert math.isnan(nothing.accuracy) and math.isnan(nothing.mean_iou) and math.isnan(nothing.frequency_weighted_iou)
    background = Confusion.of(np.zeros((4, 5), bool), np.zeros((4, 5), bool), 2)
    assert background.accuracy == 1 and math.isnan(background.iou[1]) and background.mean_iou == 1


def test_refusals():
    zeros = np.zeros((3, 4), int)
    with pytest.raises(ValueError, match="one grid"):
        Confusion.of(zeros, zeros.T, 2)
    with pytest.raises(ValueError, match="reference has 12 voxels that are neither a class"):
        Confusion.of(zeros, zeros + 7, 2)
    with pytest.raises(ValueError, match="prediction has 12 voxels"):
        Confusion.of(zeros - 1, zeros, 2)
    with pytest.raises(ValueError, match="integers"):
        Confusion.of(zeros * 0.5, zeros, 2)
    with pytest.raises(ValueError, match="same classes"):
        Confusion.zeros(2) + Confusion.zeros(3)
    with pytest.raises(ValueError, match=r"classes \+ 1"):
        Confusion(np.zeros((2, 2), int))

from __future__ import annotations

import numpy as np
import pytest
import torch

from medseg3d.tasks import (
    RLE,
    Category,
    Instances,
    Panoptic,
    Region,
    Segment,
    SemanticMap,
    instances_from_panoptic,
    instances_from_semantic,
    mask_boxes,
    panoptic_from_instances,
    panoptic_from_semantic,
    semantic_from_instances,
    semantic_from_panoptic,
)

STUFF = Category("stroma", is_thing=False)
CATEGORIES = {1: "nucleus", 3: STUFF}


def semantic_map(ndim=2):
    classes = np.zeros((6, 9), np.uint8)
    classes[0:2, 0:3] = classes[3:5, 5:8] = 1
    classes[2, 3] = 1  # touches the first piece at a corner
    classes[5] = 3
    classes[0, 8] = 255
    return SemanticMap(classes if ndim == 2 else np.stack([classes, classes * 0, classes]), CATEGORIES)


def test_pieces_of_a_semantic_map_are_instances():
    found = instances_from_semantic(semantic_map())
    assert [region.area for region in found.regions] == [6, 1, 6] and found.classes.tolist() == [1, 1, 1]
    np.testing.assert_array_equal(found.boxes, [(0, 0, 3, 2), (3, 2, 4, 3), (5, 3, 8, 5)])
    assert [r.area for r in instances_from_semantic(semantic_map(), connectivity=2).regions] == [7, 6]
    assert len(instances_from_semantic(semantic_map(), smallest=2)) == 2
    with pytest.raises(ValueError, match="connectivity is 1 to 2"):
        instances_from_semantic(semantic_map(), connectivity=3)


def test_in_three_dimensions():
    found = instances_from_semantic(semantic_map(3))
    assert len(found) == 6
    np.testing.assert_array_equal(found.boxes[0], (0, 0, 0, 3, 2, 1))
    panoptic = panoptic_from_semantic(semantic_map(3))
    assert len(panoptic.segments) == 7, "six pieces, and the stuff of both planes as one"
    np.testing.assert_array_equal(semantic_from_panoptic(panoptic).classes, semantic_map(3).classes % 255)


@pytest.mark.parametrize("ndim", [2, 3])
def test_to_panoptic_and_back_loses_only_what_has_no_class(ndim):
    semantic = semantic_map(ndim)
    panoptic = panoptic_from_semantic(semantic)
    back = semantic_from_panoptic(panoptic, void=255)
    np.testing.assert_array_equal(back.classes, np.where(np.isin(semantic.classes, [1, 3]), semantic.classes, 255))
    assert back.categories == semantic.categories == panoptic.categories
    things = instances_from_panoptic(panoptic)
    np.testing.assert_array_equal(things.masks, instances_from_semantic(semantic).masks)
    np.testing.assert_array_equal(semantic_from_instances(things).classes, (semantic.classes == 1))


@pytest.fixture
def overlapping():
    """Two objects of 4 x 4 that share 2 x 4 pixels, and a crowd below both."""
    masks = np.zeros((3, 6, 9), bool)
    masks[0, 0:4, 0:4] = masks[1, 0:4, 2:6] = masks[2] = True
    return Instances.from_masks(
        masks, classes=[1, 2, 2], scores=[0.6, 0.9, 1.0], crowd=[0, 0, 1], categories={1: "a", 2: "b"}
    )


def test_the_higher_score_is_seen_and_crowds_lie_below(overlapping):
    assert overlapping.front_to_back() == [1, 0, 2]
    label_map = overlapping.label_map()
    assert [(label_map == n).sum() for n in (1, 2, 3)] == [8, 16, 54 - 24]
    np.testing.assert_array_equal(semantic_from_instances(overlapping).classes, np.array([0, 1, 2, 2])[label_map])


def test_panoptic_from_overlapping_instances_and_stuff(overlapping):
    stuff = SemanticMap(np.full((6, 9), 7), {7: STUFF})
    half = panoptic_from_instances(overlapping[:2], stuff)
    assert {n: (half.ids == n).sum() for n in half.segments} == {1: 16, 2: 8, 3: 54 - 24}
    assert half.segments == {1: Segment(2, 0.9), 2: Segment(1, 0.6), 3: Segment(7)}
    assert set(half.categories) == {1, 2, 7} and [half.is_thing(n) for n in (1, 2, 3)] == [True, True, False]
    strict = panoptic_from_instances(overlapping[:2], stuff, least_free=0.7)
    assert list(strict.segments.values()) == [Segment(2, 0.9), Segment(7)]
    assert list(panoptic_from_instances(overlapping[:2], stuff, least_stuff=31).segments) == [1, 2]
    assert list(panoptic_from_instances(overlapping, least_score=0.95).segments.values()) == [Segment(2, 1.0, True)]
    with pytest.raises(ValueError, match="one image"):
        panoptic_from_instances(overlapping, semantic_map(3))


def test_instances_between_their_forms(overlapping):
    masks = overlapping.masks
    by_code = Instances.from_rles(overlapping.rles())
    np.testing.assert_array_equal(by_code.masks, masks)
    outlined = Instances.from_polygons(overlapping.polygons(), overlapping.shape)
    np.testing.assert_array_equal(outlined.masks, masks)
    detector = {"masks": torch.from_numpy(masks)[:, None] * 0.7, "labels": torch.tensor([1, 2, 2])}
    from_tensors = Instances.from_masks(detector["masks"][:, 0] > 0.5, classes=detector["labels"])
    np.testing.assert_array_equal(from_tensors.masks, masks)
    assert from_tensors.classes.tolist() == [1, 2, 2]
    numbered = overlapping[:2].label_map().astype(np.int64)
    numbered[numbered == 2] = 1 << 40
    for order in "CF":
        found = Instances.from_label_map(np.asarray(numbered, order=order))
        np.testing.assert_array_equal(found.masks, [masks[0] & ~masks[1], masks[1]])
    chosen = overlapping[overlapping.scores > 0.8]
    assert chosen.scores.tolist() == [0.9, 1.0] and chosen.crowd.tolist() == [False, True]
    assert overlapping.by_score().scores.tolist() == [1.0, 0.9, 0.6]
    assert overlapping[0].classes.tolist() == [1]
    squares = Instances.from_boxes([(0.4, 0.6, 3.5, 2.5)], (6, 9))
    assert squares.regions[0].slices == (slice(1, 2), slice(0, 3)), "pixels whose centres lie inside"


def test_values_do_not_change(overlapping):
    source = np.ones((4, 5), int)
    for array in (SemanticMap(source).classes, Panoptic(source, {1: Segment(1)}).ids, overlapping.scores):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    source[0] = 2
    scores = np.array([0.5])
    one = Instances.from_masks(np.ones((1, 2, 2)), scores=scores)
    scores[0] = 0.1
    assert one.scores[0] == 0.5


def test_no_instances_and_empty_masks():
    none = Instances((4, 5), [])
    assert len(none) == 0 and none.masks.shape == (0, 4, 5) and none.boxes.shape == (0, 4)
    assert not none.label_map().any() and not panoptic_from_instances(none).segments
    assert not semantic_from_instances(none).classes.any()
    assert len(Instances.from_masks(np.zeros((0, 4, 5)))) == len(Instances.from_boxes([], (4, 5))) == 0
    assert len(Instances.from_rles([], (4, 5))) == len(Instances.from_label_map(np.zeros((0, 3), int))) == 0
    blank = Instances.from_masks(np.zeros((1, 4, 5)))
    assert blank.boxes.tolist() == [[0, 0, 0, 0]] and blank.areas.tolist() == [0] and not blank.masks.any()
    assert not panoptic_from_instances(blank).segments
    assert len(instances_from_semantic(SemanticMap(np.zeros((4, 5), int)))) == 0
    assert Region.of(np.zeros((4, 5))).common(Region.of(np.ones((4, 5)))) == 0


def test_masks_are_not_probabilities():
    found = torch.tensor([[[[0.1, 0.9], [0.4, 0.8]]]])
    with pytest.raises(ValueError, match=r"choose a threshold first; of Mask R-CNN's output found\['masks'\]\[:, 0\]"):
        Instances.from_masks(found[:, 0])
    assert Instances.from_masks(found[:, 0] > 0.5).areas.tolist() == [2]
    assert Instances.from_masks((found[:, 0] > 0.5).float()).areas.tolist() == [2]


def test_tight_boxes():
    masks = np.zeros((3, 6, 7), bool)
    masks[0, 1:3, 2:6] = masks[1, 0, 0] = True
    np.testing.assert_array_equal(mask_boxes(masks), [(2, 1, 5, 2), (0, 0, 0, 0), (0, 0, 0, 0)])
    np.testing.assert_array_equal(mask_boxes(masks, inclusive=False), [(2, 1, 6, 3), (0, 0, 1, 1), (0, 0, 0, 0)])
    assert mask_boxes(masks[:0]).shape == (0, 4)


def test_names_are_made_up_where_none_are_given():
    assert SemanticMap(np.array([[0, 2]])).categories == {2: Category("class 2")}
    assert Instances.from_masks(np.ones((1, 2, 2)), classes=[5]).categories == {5: Category("class 5")}
    assert SemanticMap(np.ones((2, 2), bool)).classes.dtype == np.uint8


def test_refusals():
    ones = np.ones((1, 4, 5))
    with pytest.raises(ValueError, match="array of integers"):
        SemanticMap(np.ones((4, 5)))
    with pytest.raises(ValueError, match="two or three axes"):
        SemanticMap(np.ones(5, int))
    with pytest.raises(ValueError, match="a name"):
        SemanticMap(np.ones((4, 5), int), {1: ""})
    with pytest.raises(ValueError, match=r"ids \[1\] of the map have no segment"):
        Panoptic(np.ones((4, 5), int), {})
    with pytest.raises(ValueError, match="1 or more"):
        Panoptic(np.zeros((4, 5), int), {0: Segment(1)})
    with pytest.raises(ValueError, match=r"categories \[2\] of segments"):
        Panoptic(np.ones((4, 5), int), {1: Segment(2)}, {1: "a"})
    with pytest.raises(ValueError, match="1 masks have 1 scores"):
        Instances.from_masks(ones, scores=[1, 2])
    with pytest.raises(ValueError, match="boxes are finite numbers"):
        Instances.from_masks(ones, boxes=[(1, 2, np.nan, 4)])
    with pytest.raises(ValueError, match=r"classes \[1\] have no category"):
        Instances.from_masks(ones, categories={2: "b"})
    with pytest.raises(ValueError, match="masks are"):
        Instances.from_masks(np.ones((4, 5)))
    with pytest.raises(ValueError, match="beyond the image"):
        Instances((4, 5), [Region((3, 3), np.ones((2, 2), bool))])
    with pytest.raises(ValueError, match="no code"):
        Instances.from_rles([])
    with pytest.raises(ValueError, match="one image"):
        Instances.from_rles([RLE.of(ones[0])], (5, 4))
    with pytest.raises(ValueError, match="labels are 0"):
        Instances.from_label_map(np.array([[-1]]))
    with pytest.raises(ValueError, match="holds integers"):
        Instances.from_label_map(ones[0])
    with pytest.raises(ValueError, match="void is 1, which is the category 'a'"):
        semantic_from_instances(Instances.from_masks(ones, categories={1: "a"}), void=1)

from __future__ import annotations

import numpy as np
import pytest

from medseg3d.report.overlay import plot
from medseg3d.tasks import (
    Category,
    Instances,
    Panoptic,
    Segment,
    SemanticMap,
    instances_from_semantic,
    panoptic_from_semantic,
)

RED, BLUE, GREEN = (255, 0, 0), (0, 0, 255), (0, 255, 0)
EDGE = 20  # free space around the picture


def where(page, color, tolerance=3):
    """(rows, columns) on the page of the pixels of this colour: outlines, and the legend's square."""
    distance = np.abs(np.asarray(page).astype(int) - color).max(axis=-1)
    return np.nonzero(distance <= tolerance)


def on_picture(page, color, width):
    rows, columns = where(page, color)
    inside = columns < EDGE + width
    return rows[inside] - EDGE, columns[inside] - EDGE


@pytest.fixture
def classes():
    classes = np.zeros((40, 60), np.uint8)
    classes[5:15, 10:30] = 1
    classes[20:35, 40:55] = 2
    return classes


@pytest.mark.parametrize("channels", [(), (3,)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_regions_lie_where_they_are_in_the_image(classes, channels, dtype):
    image = np.zeros((*classes.shape, *channels), dtype)
    page = plot(image, SemanticMap(classes, {1: "a", 2: "b"}), colors={1: RED, 2: BLUE}, names=False)
    for color, (top, bottom, left, right) in ((RED, (5, 15, 10, 30)), (BLUE, (20, 35, 40, 55))):
        rows, columns = on_picture(page, color, 60 * 8)
        found = np.array([rows.min(), rows.max() + 1, columns.min(), columns.max() + 1]) / 8
        np.testing.assert_allclose(found, (top, bottom, left, right), atol=0.4)
        assert len(where(page, color)[0]) > len(rows), "the legend shows the colour too"


def test_the_image_is_not_changed_and_shines_through(classes):
    image = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    before = image.copy()
    bare = np.asarray(plot(image, SemanticMap(np.zeros_like(classes), {1: "a"})))[EDGE : EDGE + 320, EDGE : EDGE + 480]
    np.testing.assert_array_equal(image, before)
    coarse = bare.reshape(40, 8, 60, 8, 3).mean((1, 3))
    assert np.corrcoef(coarse.ravel(), image.ravel())[0, 1] > 0.95


def test_grey_images_are_stretched_and_windows_kept():
    dark = np.linspace(0, 20, 40 * 60).reshape(40, 60).astype(np.uint8)
    nothing = SemanticMap(np.zeros((40, 60), int))
    stretched, plain = (
        np.asarray(plot(dark, nothing, window=window))[EDGE : EDGE + 320, EDGE : EDGE + 480]
        for window in (None, (127.5, 255))
    )
    assert stretched.max() > 240 and plain.max() <= 21


def test_each_object_has_its_own_colour_and_detections_have_boxes(classes):
    regions = instances_from_semantic(SemanticMap(classes > 0, {1: "cell"})).regions
    image = np.zeros(classes.shape, np.uint8)
    reference = Instances(classes.shape, regions, categories={1: "cell"})
    detected = Instances(
        classes.shape, regions, scores=[0.9, 0.4], boxes=[(5, 2, 35, 18), (38, 18, 58, 38)], categories={1: "cell"}
    )
    plain, boxed = (np.asarray(plot(image, result, names=False)) for result in (reference, detected))
    inside = plain[EDGE : EDGE + 320, EDGE : EDGE + 480]
    assert (inside[80, 160] != inside[27 * 8, 47 * 8]).any()
    changed = (plain != boxed).any(axis=-1)
    rows, columns = np.nonzero(changed)
    found = (np.array([rows.min(), rows.max() + 1, columns.min(), columns.max() + 1]) - EDGE) / 8
    np.testing.assert_allclose(found, (2, 38, 5, 58), atol=0.3)
    assert not changed[EDGE + 5 * 8 : EDGE + 15 * 8, EDGE + 10 * 8 : EDGE + 30 * 8].any(), "the masks are the same"


def test_names_are_written_where_they_tell_more_than_the_legend(classes):
    image = np.zeros(classes.shape, np.uint8)
    two, one = SemanticMap(classes, {1: "a", 2: "b"}), SemanticMap(classes * (classes == 1), {1: "a", 2: "b"})
    for semantic, named in ((two, True), (one, False)):
        default, with_names, without = (np.asarray(plot(image, semantic, names=n)) for n in (None, True, False))
        assert (with_names != without).any()
        np.testing.assert_array_equal(default, with_names if named else without)


def test_panoptic_of_ids_beyond_16_bits(classes):
    ids = np.where(classes == 1, 16_777_215, np.where(classes == 2, 70_000, 0))
    panoptic = Panoptic(
        ids, {70_000: Segment(5), 16_777_215: Segment(3)}, {3: "cell", 5: Category("stroma", is_thing=False)}
    )
    page = plot(np.zeros(classes.shape, np.uint8), panoptic, colors={3: RED, 5: GREEN}, names=False)
    assert on_picture(page, RED, 480)[0].max() < 15.5 * 8 < 19 * 8 < on_picture(page, GREEN, 480)[0].min()


@pytest.mark.parametrize("kind", ["semantic", "instances", "panoptic"])
@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
@pytest.mark.parametrize("codes", ["RAS", "PIR"])
def test_a_plane_of_a_scan(patient, kind, plane, codes):
    turned = patient.reoriented(codes)
    semantic = SemanticMap(turned.segmentation.array, turned.labels)
    result = {
        "semantic": semantic,
        "instances": instances_from_semantic(semantic),
        "panoptic": panoptic_from_semantic(semantic),
    }[kind]
    page = plot(turned.image, result, plane=plane, colors=turned.colors, names=False)
    right, left = (where(page, color)[1] for color in (RED, BLUE))
    if plane == "sagittal":
        assert len(right) + len(left) > 100
    else:
        legend = page.width - EDGE - 250
        assert right[right < legend].max() < left[left < legend].min(), "the patient's right is on the left"


def test_the_place_of_a_plane_is_chosen_or_given(patient):
    semantic = SemanticMap(patient.segmentation.array, patient.labels)
    options = {"colors": patient.colors, "plane": "sagittal", "names": False}
    through_the_right = plot(patient.image, semantic, position=30, **options)
    picture = through_the_right.width - 250 - 2 * EDGE - 20
    assert len(on_picture(through_the_right, RED, picture)[0]) > 100
    assert not len(on_picture(through_the_right, BLUE, picture)[0])
    with pytest.raises(ValueError, match="sagittal planes of the scan lie at -60 to 60 mm, got 100"):
        plot(patient.image, semantic, position=100, **options)


def test_nothing_found_one_pixel_and_an_empty_image():
    none = Instances((4, 5), [], categories={1: "cell"})
    assert plot(np.zeros((4, 5)), none, title="none").size == plot(np.full((4, 5), 7), none, title="none").size
    one = plot(np.zeros((1, 1), np.uint8), SemanticMap(np.ones((1, 1), int), {1: "a"}), colors={1: RED}, names=True)
    assert one.getpixel((EDGE + 4, EDGE + 4)) == (102, 0, 0), "the colour over black"
    blank = Instances.from_boxes([(3, 3, 3, 3)], (4, 5), scores=[0.5])
    plot(np.zeros((4, 5)), blank, names=True)
    with pytest.raises(ValueError, match="not empty"):
        plot(np.zeros((0, 5)), SemanticMap(np.zeros((0, 5), int)))


def test_refusals(patient):
    image, semantic = np.zeros((4, 5)), SemanticMap(np.zeros((4, 5), int))
    with pytest.raises(ValueError, match="one shape"):
        plot(image.T, semantic)
    with pytest.raises(ValueError, match="rows, columns, 3"):
        plot(np.zeros((4, 5, 2)), semantic)
    with pytest.raises(ValueError, match="width above 0"):
        plot(image, semantic, window=(40, 0))
    with pytest.raises(ValueError, match="plot draws"):
        plot(image, image)
    with pytest.raises(ValueError, match="a plane is one of"):
        plot(patient.image, SemanticMap(patient.segmentation.array), plane="oblique")

from __future__ import annotations

import json

import numpy as np
import pytest

from medseg3d.io import (
    read_coco,
    read_coco_results,
    read_label_image,
    read_panoptic,
    write_coco,
    write_coco_results,
    write_panoptic,
)
from medseg3d.io.panoptic import colors_of_ids, ids_of_colors
from medseg3d.metrics import PanopticQuality
from medseg3d.tasks import RLE, Category, Instances, Panoptic, Segment

CATEGORIES = {1: "nucleus", 4: Category("stroma", is_thing=False)}


@pytest.fixture
def instances():
    masks = np.zeros((4, 12, 15), bool)
    masks[0, 2:9, 3:11] = True
    masks[0, 4:6, 5:7] = False  # a hole
    masks[1, 0, 0] = masks[1, 1, 1] = True  # two pixels that touch at a corner
    masks[2, 11, 14] = True  # one pixel
    return Instances.from_masks(
        masks, classes=[1, 1, 4, 1], scores=[1, 0.5, 0.25, 1], crowd=[0, 0, 0, 1], categories=CATEGORIES
    )


def same(a, b):
    assert a.shape == b.shape and a.categories == b.categories
    np.testing.assert_array_equal(a.masks, b.masks)
    for name in ("classes", "scores", "boxes", "areas", "crowd"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


@pytest.mark.parametrize("as_polygons", [False, True])
def test_references_come_back_as_written(tmp_path, instances, as_polygons):
    none = Instances((4, 5), [], categories=CATEGORIES)
    path = write_coco(tmp_path / "out" / "coco.json", {"a.png": instances, "b.png": none}, as_polygons)
    read = read_coco(path)
    assert [(n, entry.file_name, entry.shape) for n, entry in read.images.items()] == [
        (1, "a.png", (12, 15)),
        (2, "b.png", (4, 5)),
    ]
    same(read.instances(1), instances)
    same(read.instances(2), none)
    document = json.loads(path.read_text())
    assert [a["id"] for a in document["annotations"]] == [1, 2, 3, 4]
    assert isinstance(document["annotations"][0]["segmentation"], list) == as_polygons
    assert document["annotations"][0]["bbox"] == [3, 2, 8, 7]
    assert document["annotations"][3]["bbox"] == [0, 0, 0, 0], "an empty mask"


def test_detections_come_back_as_written(tmp_path, instances):
    reference = read_coco(write_coco(tmp_path / "coco.json", {"a.png": instances}))
    found = Instances(
        (12, 15), instances.regions[:3], scores=[0.3, 0.2, 0.1], boxes=[(0.5, 1.25, 7, 8)] * 3, categories=CATEGORIES
    )
    masks, boxes = (
        read_coco_results(write_coco_results(tmp_path / "r.json", {1: found}, geometry), reference).instances(1)
        for geometry in ("masks", "boxes")
    )
    np.testing.assert_array_equal(masks.masks, found.masks)
    np.testing.assert_array_equal(boxes.boxes, found.boxes)
    for read in (masks, boxes):
        np.testing.assert_array_equal(read.scores, found.scores)
        np.testing.assert_array_equal(read.classes, found.classes)
    # Masks without boxes: COCO's program would take the boxes' areas as those of the masks.
    assert set(json.loads((tmp_path / "r.json").read_text())[0]) == {"image_id", "category_id", "bbox", "score"}
    np.testing.assert_array_equal(masks.areas, [region.area for region in found.regions])


def entry(**changes):
    return {"id": 7, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], **changes}


def write(path, *annotations, **changes):
    document = {
        "images": [{"id": 1, "file_name": "a.png", "height": 12, "width": 15}],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "nucleus"}],
    }
    path.write_text(json.dumps(document | changes))
    return path


def test_what_other_programs_write(tmp_path):
    plain = {"size": [12, 15], "counts": [0, 3, 177]}
    box_only = entry(iscrowd=0)
    polygon = entry(segmentation=[[2, 2, 6, 2, 6, 6, 2, 6], [9, 9, 10, 10]], area=15.5)
    no_box = {"image_id": 1, "category_id": 1, "segmentation": plain, "iscrowd": 1}
    nothing = entry(bbox=[3, 3, 0, 5])
    beyond = entry(bbox=[-3.5, -2, 6, 30])
    found = read_coco(write(tmp_path / "a.json", box_only, polygon, no_box, nothing, beyond)).instances(1)
    assert [region.area for region in found.regions] == [12, 16, 3, 0, 3 * 12 - 12]
    np.testing.assert_array_equal(found.areas, [12, 15.5, 3, 0, 24])
    np.testing.assert_array_equal(found.boxes[[0, 2, 3]], [(1, 2, 4, 6), (0, 0, 1, 3), (3, 3, 3, 8)])
    assert found.crowd.tolist() == [False, False, True, False, False]
    assert found.categories == {1: Category("nucleus")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bbox": [1, 2, -3, 4]}, "annotation 7 of image 1 is damaged: its box"),
        ({"bbox": [1, 2, 3]}, "annotation 7"),
        ({"bbox": None}, "it has no 'segmentation or bbox'"),
        ({"segmentation": {"size": [5, 5], "counts": [25]}}, r"shape \(5, 5\), the image \(12, 15\)"),
        ({"segmentation": {"size": [12, 15], "counts": [25]}}, "add up"),
        ({"segmentation": {"size": [12, 15], "counts": "\u00ff"}}, "annotation 7"),
        ({"segmentation": {"size": [12, 15]}}, "run-length code"),
        ({"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}, "corners"),
        ({"category_id": 9}, r"\[9\] have no category"),
    ],
)
def test_damaged_annotations(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read_coco(write(tmp_path / "a.json", entry(**changes))).instances(1)


def test_damaged_files(tmp_path, instances):
    path = tmp_path / "a.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_coco(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="lacks the lists"):
        read_coco(path)
    with pytest.raises(ValueError, match="one of the images listed"):
        read_coco(write(path, entry(image_id=2)))
    with pytest.raises(ValueError, match="one lacks 'file_name'"):
        read_coco(write(path, images=[{"id": 1}]))
    with pytest.raises(ValueError, match="a category has"):
        read_coco(write(path, categories=[{"id": 1}]))
    with pytest.raises(ValueError, match="no list of detections"):
        read_coco_results(path, read_coco(write(path)))
    with pytest.raises(ValueError, match="category 1 is"):
        write_coco(path, {"a": instances, "b": instances.with_categories({**CATEGORIES, 1: "cell"})})
    with pytest.raises(ValueError, match="two axes"):
        write_coco(path, {"a": Instances.from_masks(np.ones((1, 2, 2, 2)))})


@pytest.fixture
def panoptic():
    ids = np.zeros((6, 7), np.int64)
    ids[:2], ids[2:4, :3], ids[5, 6] = 16777215, 300, 70000
    segments = {16777215: Segment(4), 300: Segment(1, score=0.5), 70000: Segment(1, crowd=True)}
    return Panoptic(ids, segments, CATEGORIES)


def test_panoptic_comes_back_as_written(tmp_path, panoptic):
    path = write_panoptic(tmp_path / "panoptic.json", {"a.jpg": panoptic})
    assert (tmp_path / "panoptic" / "a.png").exists()
    file = read_panoptic(path)
    read = file.panoptic(1)
    np.testing.assert_array_equal(read.ids, panoptic.ids)
    assert read.segments == panoptic.segments and read.categories == panoptic.categories
    segment = json.loads(path.read_text())["annotations"][0]["segments_info"][1]
    assert segment == {"id": 300, "category_id": 1, "iscrowd": 0, "bbox": [0, 2, 3, 2], "area": 6, "score": 0.5}
    empty = Panoptic(np.zeros((2, 2), int), {3: Segment(1)}, CATEGORIES)
    assert read_panoptic(write_panoptic(path, {"b.jpg": empty})).panoptic(1).segments == {}


def test_colors_of_ids():
    ids = np.array([[0, 1, 255, 256], [65535, 65536, 3226956, (1 << 24) - 1]])
    np.testing.assert_array_equal(ids_of_colors(colors_of_ids(ids)), ids)
    np.testing.assert_array_equal(colors_of_ids(ids)[1, 2], [76, 61, 49])
    for wrong in (-1, 1 << 24):
        with pytest.raises(ValueError, match="a colour holds"):
            colors_of_ids(np.array([[wrong]]))


def test_damaged_panoptic_files(tmp_path, panoptic):
    path = write_panoptic(tmp_path / "p.json", {"a.jpg": panoptic})
    document = json.loads(path.read_text())
    segments = document["annotations"][0]["segments_info"]
    for damaged, message in ((segments[1:], "have no segment"), ([{"id": 0, "category_id": 1}], "stands for void")):
        document["annotations"][0]["segments_info"] = damaged
        path.write_text(json.dumps(document))
        with pytest.raises(ValueError, match=f"a.png does not fit.*{message}"):
            read_panoptic(path).panoptic(1)
    document["images"][0]["width"] = 8
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"shape \(6, 7\), its image \(6, 8\)"):
        read_panoptic(path).panoptic(1)
    document["annotations"][0]["image_id"] = 2
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match="an annotation has"):
        read_panoptic(path)
    with pytest.raises(ValueError, match=r"two images would write a\.png"):
        write_panoptic(path, {"a.jpg": panoptic, "b/a.png": panoptic})
    with pytest.raises(ValueError, match="red, green and blue of 8 bits"):
        ids_of_colors(np.zeros((3, 4), np.uint16))


def test_real_panoptic_annotations(shared, tmp_path):
    file = read_panoptic(shared("data", "coco-panoptic-sample") / "panoptic.json")
    stored = json.loads((shared("data", "coco-panoptic-sample") / "panoptic.json").read_text())
    written = {}
    for annotation in stored["annotations"]:
        panoptic = file.panoptic(annotation["image_id"])
        written[file.images[annotation["image_id"]].file_name] = panoptic
        for segment in annotation["segments_info"]:
            assert (panoptic.ids == segment["id"]).sum() == segment["area"]
        assert PanopticQuality.of(panoptic, panoptic).all.pq == 1
    again = json.loads(write_panoptic(tmp_path / "panoptic.json", written).read_text())
    for ours, theirs in zip(again["annotations"], stored["annotations"], strict=True):
        for a, b in zip(ours["segments_info"], theirs["segments_info"], strict=True):
            assert a == {key: b[key] for key in ("id", "category_id", "iscrowd", "bbox", "area")}


def test_nuclei_as_coco(shared, tmp_path):
    labels = read_label_image(sorted(shared("data", "dsb2018-nuclei").glob("*_labels.png"))[2])
    nuclei = Instances.from_label_map(labels, categories={1: "nucleus"})
    assert len(nuclei) == 82
    for as_polygons in (False, True):
        read = read_coco(write_coco(tmp_path / "nuclei.json", {"n.png": nuclei}, as_polygons)).instances(1)
        np.testing.assert_array_equal(read.label_map() > 0, labels > 0)
        np.testing.assert_array_equal(read.masks, nuclei.masks)
    assert [RLE.of(mask).area for mask in nuclei.masks] == [region.area for region in nuclei.regions]

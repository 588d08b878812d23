"""Run-length codes, polygons and average precision against pycocotools (golden/2d/coco)."""

from __future__ import annotations

import json

import numpy as np
import pytest

from medseg3d.metrics import CocoPrecision, pairwise_iou
from medseg3d.tasks import RLE, Instances, mask_boxes, polygons, rle
from tests.parity.golden2d import check


@pytest.fixture(scope="module")
def folder():
    from tests.conftest import shared

    return shared("golden", "2d", "coco")


@pytest.fixture(scope="module")
def golden(folder):
    return json.loads((folder / "coco.json").read_text()), np.load(folder / "coco.npz")


@pytest.fixture(scope="module")
def codes(golden):
    return [RLE.from_json(data) for data in golden[0]["rle"]["rles"]]


def test_codes_of_masks_both_ways(golden, codes):
    tables, arrays = golden
    h, w = tables["rle"]["hw"]
    masks = np.unpackbits(arrays["masks"])[: len(codes) * h * w].reshape(-1, h, w).astype(bool)
    for mask, code, stored in zip(masks, codes, tables["rle"]["rles"], strict=True):
        np.testing.assert_array_equal(code.mask(), mask)
        assert RLE.of(mask).to_json() == code.to_json() == stored


def test_areas_boxes_and_combinations(golden, codes):
    tables = golden[0]["rle"]
    assert [code.area for code in codes] == tables["area"]
    assert [list(code.bbox) for code in codes] == tables["bbox"]
    firsts = {n: (rle.union(codes[:n]).text(), rle.intersection(codes[:n]).text()) for n in range(1, len(codes) + 1)}
    pairs = {
        (a, b): (rle.union([codes[a], codes[b]]).text(), rle.intersection([codes[a], codes[b]]).text())
        for a in range(len(codes))
        for b in range(len(codes))
    }
    assert tables["merge_or"] in {text for text, _ in [*firsts.values(), *pairs.values()]}
    assert tables["merge_and"] in {text for _, text in [*firsts.values(), *pairs.values()]}


def test_iou_of_codes_and_masks_with_crowds(golden, codes):
    tables = golden[0]["rle"]
    crowd = [bool(flag) for flag in tables["iscrowd"]]
    np.testing.assert_array_equal(rle.iou(codes, codes, crowd), tables["iou"])
    instances = Instances.from_rles(codes, crowd=crowd)
    np.testing.assert_array_equal(pairwise_iou(instances, instances, "masks", crowd=True), tables["iou"])


def test_polygons_are_filled_as_the_reference_fills_them(golden):
    tables = golden[0]["rle"]
    for shape, text, area in zip(tables["polygons"], tables["polygon_rles"], tables["polygon_areas"], strict=True):
        mask = polygons.fill(shape, tables["hw"])
        assert RLE.of(mask).text() == text
        assert mask.sum() == area


def instances_of(entries, shape, categories, geometry, reference):
    """What the entries of a COCO file say; detections have one geometry only."""
    columns = {"classes": [e["category_id"] for e in entries], "categories": categories}
    boxes = np.array([e["bbox"] for e in entries], float).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    if reference:
        columns |= {"crowd": [e["iscrowd"] == 1 for e in entries], "areas": [e["area"] for e in entries]}
    else:
        columns["scores"] = [e["score"] for e in entries]
    if geometry == "boxes":
        return Instances.from_boxes(boxes, shape, **columns)
    return Instances.from_rles([RLE.from_json(e["segmentation"]) for e in entries], shape, boxes=boxes, **columns)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(("name", "geometry"), [("segm", "masks"), ("bbox", "boxes")])
def test_average_precision(golden, number, name, geometry):
    tables, arrays = golden
    data = tables["sets"][number]
    truth = data["ground_truth"]
    categories = {c["id"]: c["name"] for c in truth["categories"]}

    def pairs():
        for image in sorted(truth["images"], key=lambda image: image["id"]):
            shape = image["height"], image["width"]
            detected = [e for e in data["detections"] if e["image_id"] == image["id"]]
            expected = [e for e in truth["annotations"] if e["image_id"] == image["id"]]
            yield (
                instances_of(detected, shape, categories, geometry, reference=False),
                instances_of(expected, shape, categories, geometry, reference=True),
            )

    measured = CocoPrecision.over(pairs(), geometry)
    check(np.nan_to_num(measured.precision[:, ::5], nan=-1), arrays[f"set{number}_{name}_precision"], 1e-7)
    check(np.nan_to_num(measured.recall, nan=-1), arrays[f"set{number}_{name}_recall"], 1e-7)
    ours = measured.summary()
    assert list(ours) == tables["stats_order"]
    np.testing.assert_allclose(np.nan_to_num(list(ours.values()), nan=-1), data[name]["stats"], rtol=0, atol=1e-12)
    each = [measured.average_precision(category=category) for category in categories]
    np.testing.assert_allclose(np.nan_to_num(each, nan=-1), data[name]["ap_per_category"], rtol=0, atol=1e-12)


def test_masks_to_boxes(shared):
    arrays = np.load(shared("golden", "2d", "ops") / "losses.npz")
    stored = arrays["masks_to_boxes"]
    masks = arrays["target"] > 0.5
    np.testing.assert_array_equal(mask_boxes(masks), stored)

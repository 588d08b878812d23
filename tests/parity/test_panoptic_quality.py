"""Panoptic quality against panopticapi (golden/2d/panoptic)."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from medseg3d.metrics import PanopticQuality
from medseg3d.tasks import Category, Panoptic, Segment


class Golden:
    def __init__(self, folder, name):
        self.tables = json.loads((folder / f"{name}.json").read_text())
        self.arrays = np.load(folder / f"{name}.npz")
        self.categories = {int(n): Category(f"c{n}", bool(c["isthing"])) for n, c in self.tables["categories"].items()}

    def pair(self, image, key):
        sides = []
        for side in ("pred", "gt"):
            ids = self.arrays[f"{side}{key}" if isinstance(key, int) else f"edge_{side}_{key}"]
            segments = {
                s["id"]: Segment(s["category_id"], crowd=s.get("iscrowd") == 1) for s in image[f"{side}_segments"]
            }
            sides.append(Panoptic(ids, segments, self.categories))
        return sides

    def check(self, measured, result):
        """Where the reference program has zeros for a category without a segment, or fails on an empty group, ours
        has no entry, or nan over 0 categories."""
        for group in ("all", "things", "stuff"):
            ours, stored = getattr(measured, group), result[group]
            if stored is None:
                assert ours.categories == 0 and math.isnan(ours.pq)
                continue
            assert ours.categories == stored["n"]
            np.testing.assert_allclose((ours.pq, ours.sq, ours.rq), [stored[k] for k in ("pq", "sq", "rq")], atol=1e-12)
        for number, stored in result["per_class"].items():
            ours = measured.per_category.get(int(number))
            values = (0, 0, 0) if ours is None else (ours.pq, ours.sq, ours.rq)
            np.testing.assert_allclose(values, [stored[k] for k in ("pq", "sq", "rq")], atol=1e-12)
        for number, stored in result.get("per_class_counts", {}).items():
            counts = measured.counts[int(number)]
            assert (counts.tp, counts.fp, counts.fn) == (stored["tp"], stored["fp"], stored["fn"])
            assert counts.iou == pytest.approx(stored["iou"], abs=1e-12)


@pytest.fixture(scope="module")
def folder():
    from tests.conftest import shared

    return shared("golden", "2d", "panoptic")


@pytest.mark.parametrize("group", [0, 1, 2])
def test_groups_of_images(folder, group):
    golden = Golden(folder, "pq")
    group = golden.tables["groups"][group]
    parts = [PanopticQuality.of(*golden.pair(image, image["index"])) for image in group["images"]]
    golden.check(sum(parts, PanopticQuality()), group["result"])


def test_edge_cases(folder):
    golden = Golden(folder, "pq")
    assert len(golden.tables["edges"]) == 7
    for edge in golden.tables["edges"]:
        golden.check(PanopticQuality.of(*golden.pair(edge, edge["name"])), edge["result"])


def test_real_annotations(folder):
    golden = Golden(folder, "pq_sample")
    images = golden.tables["images"]
    parts = [PanopticQuality.of(*golden.pair(image, image["index"])) for image in images]
    golden.check(sum(parts, PanopticQuality()), golden.tables["result"])


def test_a_scan_is_counted_like_an_image(folder):
    """The planes of a scan, as one array: segments are the same voxels."""
    golden = Golden(folder, "pq")
    image = golden.tables["groups"][0]["images"][0]
    prediction, reference = golden.pair(image, 0)
    scan = [Panoptic(side.ids.reshape(8, 6, 64), side.segments, side.categories) for side in (prediction, reference)]
    assert PanopticQuality.of(*scan).counts == PanopticQuality.of(prediction, reference).counts

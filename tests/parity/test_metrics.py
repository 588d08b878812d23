"""Metrics against MONAI 1.6.1 (golden/3d/metrics)."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from medseg3d.metrics import dice, evaluate_case, iou, overlaps, surface_distances

CASES = ["plain", "empty_classes", "identical", "one_voxel", "touching_border"]
SPACINGS = {"none": (1, 1, 1), "0.7x0.7x2.5": (0.7, 0.7, 2.5), "2.0x1.0x0.5": (2, 1, 0.5), "1.5": (1.5, 1.5, 1.5)}


class Golden:
    """One stored case: label maps, and tables [batch][class] of the foreground classes 1, 2, ..."""

    def __init__(self, folder, name):
        self.tables = json.loads((folder / f"{name}.json").read_text())
        arrays = np.load(folder / f"{name}.npz")
        self.pairs = list(zip(arrays["prediction"], arrays["ground_truth"], strict=True))
        self.labels = range(1, self.tables["num_classes"])

    def check(self, table, measured, atol):
        """`measured`: one {label: value} per item of the batch. The positions of nan and inf are exact."""
        ours = np.array([list(item.values()) for item in measured])
        np.testing.assert_allclose(ours, np.array(table, dtype=float), rtol=0, atol=atol)


@pytest.fixture(params=CASES)
def golden(request, shared):
    return Golden(shared("golden", "3d", "metrics"), request.param)


def test_dice_and_iou_with_an_empty_class_counted_as_agreement(golden):
    golden.check(
        golden.tables["dice_keep_empty"], [dice(p, r, golden.labels, empty=1.0) for p, r in golden.pairs], 1e-6
    )
    golden.check(golden.tables["iou_keep_empty"], [iou(p, r, golden.labels, empty=1.0) for p, r in golden.pairs], 1e-6)


def test_evaluate_case_leaves_classes_out_where_monai_does(golden):
    """MONAI's default (`ignore_empty`) is nan where the reference is empty, predicted or not: None in a row of ours."""
    names = {label: str(label) for label in golden.labels}
    for name in ("dice", "iou"):
        rows = [evaluate_case(p, r, (1, 1, 1), names) for p, r in golden.pairs]
        values = [{row["label"]: math.nan if row[name] is None else row[name] for row in case} for case in rows]
        golden.check(golden.tables[name], values, 1e-6)


def test_background_as_a_mask(golden):
    backgrounds = [dice(p == 0, r == 0, [1]) for p, r in golden.pairs]
    golden.check([row[:1] for row in golden.tables["dice_bg"]], backgrounds, 1e-6)


def test_precision_and_recall(golden):
    counts = [overlaps(p, r, golden.labels) for p, r in golden.pairs]
    confusion = golden.tables["confusion"]
    golden.check(confusion["precision"], [{k: o.precision for k, o in c.items()} for c in counts], 1e-6)
    golden.check(confusion["sensitivity"], [{k: o.recall for k, o in c.items()} for c in counts], 1e-6)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_surface_measures(golden, spacing):
    tables = golden.tables["surface_by_spacing"][spacing]
    items = [surface_distances(p, r, SPACINGS[spacing], golden.labels) for p, r in golden.pairs]

    def check(name, measure, atol=1e-5, table=None):
        table = tables[name] if table is None else table
        golden.check(table, [{label: measure(d) for label, d in item.items()} for item in items], atol)

    for directed, suffix in ((False, ""), (True, "_directed")):
        maximum = np.array(tables[f"hd_None{suffix}"], dtype=float)
        check(f"hd_None{suffix}", lambda d, directed=directed: d.hausdorff(directed=directed))
        for percentile in (50, 95):
            # One side empty: a percentile is nan in MONAI while the maximum is inf; ours is inf in both.
            monai = np.array(tables[f"hd_{percentile}{suffix}"], dtype=float)
            expected = np.where(np.isinf(maximum), np.inf, monai)
            check("", lambda d, q=percentile, directed=directed: d.hausdorff(q, directed), table=expected)
    check("asd", lambda d: d.average(symmetric=False))
    check("assd", lambda d: d.average())
    for tolerance in (0.5, 1.0, 2.0):
        check(f"nsd_{tolerance}", lambda d, t=tolerance: d.dice(t), atol=1e-6)

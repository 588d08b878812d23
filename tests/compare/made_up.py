"""A comparison with figures that are made up."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from medseg3d.compare.result import Comparison, Model
from medseg3d.data.datasets import Case

NAMES = ("brainstem", "spinal_cord", "parotid_right", "parotid_left", "esophagus", "larynx", "jaw")
ORGANS = dict(enumerate(NAMES, start=1))
SIZES = (28, 30, 24, 24, 14, 20, 70)  # ml


def made_up(models=("ct_unet", "ct_vnet"), patients=12, better=0.05, seed=0, drop=(), **changes):
    """Each model's Dice is by ``better`` less than that of the one before; ``drop``: (model, case) without results."""
    random = np.random.default_rng(seed)
    cases = tuple(Case(f"case{n}", (Path(f"{n}.nii"),), Path(f"{n}_seg.nii"), f"patient{n}") for n in range(patients))
    hard = random.uniform(0, 0.15, (patients, len(ORGANS)))
    rows, costs = [], []
    for m, model in enumerate(models):
        for p, case in enumerate(cases):
            if (model, case.name) in drop:
                continue
            first = {"model": model, "case": case.name, "patient": case.patient}
            for o, (number, name) in enumerate(ORGANS.items()):
                dice = float(np.clip(0.9 - better * m - hard[p, o] + random.normal(0, 0.01), 0, 1))
                rows.append(first | row(number, name, dice, SIZES[o] * float(random.uniform(0.6, 1.6))))
            seconds = 3.0 * 2**m
            costs.append(
                first
                | {"seconds": seconds, "cpu_seconds": seconds, "network_seconds": seconds / 2, "windows": 18}
                | {"peak_memory_mb": 600.0 + 150 * m, "held_before_mb": 500.0, "device_peak_mb": None}
                | {"gflop": 100.0 * 3**m}
            )
    names = tuple(ORGANS.values())
    given = {
        "title": "made up",
        "models": tuple(Model(name, names, "0" * 64, "SubVolumes", 4_500_000) for name in models),
        "cases": cases,
        "labels": ORGANS,
        "shared": names,
        "rows": tuple(rows),
        "costs": tuple(costs),
        "failures": (),
        "predictions": {},
        "notes": (),
        "machines": ("a machine",),
    }
    return Comparison(**{**given, **changes})


def row(number, name, dice, reference_ml=20.0, volume_error_percent=10.0):
    """As `evaluate_case` gives it."""
    return {
        "label": number, "name": name, "dice": dice, "nsd": dice, "nsd_tolerance_mm": 2.0, "hd95_mm": 20 * (1 - dice),
        "hd_mm": 30 * (1 - dice), "assd_mm": 3 * (1 - dice), "iou": dice / (2 - dice), "precision": dice,
        "recall": dice, "volume_ml": reference_ml * 1.1, "reference_ml": reference_ml,
        "volume_error_ml": 0.1 * reference_ml, "volume_error_percent": volume_error_percent, "note": "",
    }  # fmt: skip

"""The examples of docs/tasks.md run, one after another."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "tasks.md").read_text()


def test_the_snippets_run_one_after_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(snippets) == 6
    names: dict = {}
    for snippet in snippets:
        exec(compile(snippet, "docs/tasks.md", "exec"), names)
    assert names["image"].dtype == np.uint16
    np.testing.assert_array_equal(names["labels"], names["classes"])
    np.testing.assert_array_equal(names["again"].masks, names["glands"].masks)
    np.testing.assert_array_equal(names["whole"].ids, names["panoptic"].ids)
    assert names["pixels"].accuracy == 1 and names["objects"].found == 2
    assert {"overlay.png", "classes.png", "glands.json", "panoptic.json"} <= {p.name for p in tmp_path.iterdir()}


def test_every_measure_that_the_page_names_exists():
    from medseg3d import metrics

    for name in ("CocoRules", "dice", "hausdorff", "surface_dice"):
        assert f"`{name}`" in PAGE and hasattr(metrics, name)

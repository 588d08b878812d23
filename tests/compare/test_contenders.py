"""Who takes part, and which labels are the same."""

from __future__ import annotations

import pytest

from medseg3d.compare import Contender, contenders_of
from medseg3d.compare.contenders import numbers_of
from tests import tiny_bundles as tiny
from tests import tiny_pictures


def test_each_model_in_each_strategy(bundles):
    found = contenders_of([bundles.own, bundles.threshold], ["sub-volumes", "downsampled"])
    names = [contender.title for contender in found]
    assert names == [
        *("own_ct_unet sub-volumes", "own_ct_unet downsampled"),
        *("bone_ct_threshold sub-volumes", "bone_ct_threshold downsampled"),
    ]
    assert [contender.title for contender in contenders_of([bundles.own])] == ["own_ct_unet"]
    named = Contender(bundles.own, "downsampled", "small/fast")
    assert contenders_of([named], ["sub-volumes"]) == (named,), "a contender has its strategy"
    assert named.title == "small/fast" and named.slug == "small_fast"


def test_the_hash_is_of_what_decides(tmp_path):
    contender = Contender(tiny.write_threshold_bundle(tmp_path / "a"))
    same = Contender(tiny.write_threshold_bundle(tmp_path / "b"))
    assert contender.sha256 == same.sha256
    config = tmp_path / "b" / "configs" / "inference.json"
    config.write_text(config.read_text().replace("0.25", "0.5"))
    assert Contender(tmp_path / "b").sha256 != contender.sha256


def test_what_cannot_be_compared_is_refused(bundles, tmp_path):
    with pytest.raises(ValueError, match="one model or more"):
        contenders_of([])
    with pytest.raises(ValueError, match="two models are called own_ct_unet"):
        contenders_of([bundles.own, bundles.own])
    with pytest.raises(ValueError, match="unknown model"):
        contenders_of(["no_such_model"])
    pictures = tiny_pictures.write_picture_bundle(tmp_path / "cells", "instances")
    with pytest.raises(ValueError, match="segments pictures"):
        contenders_of([pictures])


def test_labels_are_the_same_by_name():
    own = {0: "background", 1: "Spinal cord", 2: "liver", 5: "parotid-left"}
    reference = {0: "background", 3: "spinal_cord", 4: "parotid_left", 6: "larynx"}
    assert numbers_of(own, reference) == {1: 3, 5: 4}


def test_labels_are_the_same_as_in_an_evaluation():
    assert numbers_of({1: "Parotid (left)", 2: "-larynx."}, {7: "parotid_left", 8: "larynx"}) == {1: 7, 2: 8}

"""Several models on one scan: priority, numbers, names and what a report says."""

from __future__ import annotations

import numpy as np
import pytest

from medseg3d.batch import predict_many
from medseg3d.several import SeveralModels


@pytest.fixture
def both(models):
    return SeveralModels([models.threshold, models.own])


def test_earlier_models_have_priority(both, models, ct_file):
    first, second = (model.predict(ct_file).segmentation.array for model in (models.threshold, models.own))
    merged = both.predict(ct_file)
    assert merged.labels == {1: "bone", 3: "left", 2: "right"}
    expected = np.where(first > 0, first, np.array([0, 3, 2], np.uint8)[second])
    np.testing.assert_array_equal(merged.segmentation.array, expected)
    assert merged.model_name == "bone_ct_threshold 0.5.3 + own_ct_unet 0.5.3" == both.name
    assert all(warning.startswith(tuple(m.name for m in both.models)) for warning in merged.warnings)
    assert both.record["bundle_sha256"] not in [model.record["bundle_sha256"] for model in both.models]


def test_a_name_in_two_models_is_refused_or_united(models, ct_file):
    with pytest.raises(ValueError, match=r"own_ct_unet .* and .* both have the label left, right: say --unite"):
        SeveralModels([models.own, models.zoo])
    united = SeveralModels([models.own, models.own], unite=True).predict(ct_file)
    np.testing.assert_array_equal(united.segmentation.array, models.own.predict(ct_file).segmentation.array)
    with pytest.raises(ValueError, match="got none"):
        SeveralModels([])


def test_a_batch_of_scans(both, ct_file, tmp_path):
    (outcome,) = predict_many(both, ct_file, tmp_path / "out")
    assert outcome.error is None and outcome.outputs["segmentation"].is_file()
    (again,) = predict_many(both, ct_file, tmp_path / "out", resume=True)
    assert again.resumed
    (other,) = predict_many(SeveralModels(both.models[::-1]), ct_file, tmp_path / "out", resume=True)
    assert not other.resumed, "another priority is another result"

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg3d.tasks import RLE, rle


def masks(seed, shape, number=2):
    rng = np.random.default_rng(seed)
    return rng.random((number, *shape)) < rng.choice([0, 0.1, 0.5, 0.9, 1], (number, *(1 for _ in shape)))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), shape=st.lists(st.integers(1, 7), min_size=2, max_size=3).map(tuple))
def test_codes_are_what_the_masks_are(seed, shape):
    a, b = masks(seed, shape)
    codes = [RLE.of(a), RLE.of(b)]
    for mask, code in zip((a, b), codes, strict=True):
        np.testing.assert_array_equal(code.mask(), mask)
        assert code.area == mask.sum()
        assert (code.counts[1:] > 0).all(), "only the first run may be empty"
        again = RLE.from_json(code.to_json())
        np.testing.assert_array_equal(again.counts, code.counts)
        np.testing.assert_array_equal(RLE.from_text(code.text().encode(), shape).counts, code.counts)
    assert rle.union(codes).text() == RLE.of(a | b).text()
    assert rle.intersection(codes).text() == RLE.of(a & b).text()
    expected = (a & b).sum() / max(1, (a | b).sum())
    assert rle.iou(codes[:1], codes[1:]) == expected
    assert rle.iou(codes[:1], codes[1:], [True]) == (a & b).sum() / max(1, a.sum())


def test_a_code_by_hand():
    """Columns first: 3 zeros, 2 ones, 1 zero; long runs take several characters, and negative differences too."""
    mask = np.array([[0, 1], [0, 1], [0, 0]])
    code = RLE.of(mask)
    assert code.counts.tolist() == [3, 2, 1] and code.text() == "321"
    assert RLE.of(1 - mask).counts.tolist() == [0, 3, 2, 1]
    # 100 = 3 * 32 + 4: "T3"; 5; 895 = 27 * 32 + 31: "ok0"; 2 - 5 = -3: "M"; 898 - 895 = 3.
    assert RLE((10, 190), np.array([100, 5, 895, 2, 898])).text() == "T35ok0M3"
    assert RLE.from_text("T35ok0M3", (10, 190)).counts.tolist() == [100, 5, 895, 2, 898]


@pytest.mark.parametrize(
    ("mask", "bbox"),
    [
        (np.zeros((4, 5)), (0, 0, 0, 0)),
        (np.ones((4, 5)), (0, 0, 5, 4)),
        (np.eye(4, 5), (0, 0, 4, 4)),
        (np.eye(1, 1), (0, 0, 1, 1)),
        (np.pad(np.ones((1, 2)), ((2, 1), (1, 2))), (1, 2, 2, 1)),
    ],
)
def test_boxes(mask, bbox):
    assert RLE.of(mask).bbox == bbox


def test_refusals():
    for counts in ([3, 2], [3, -2, 5], [[6]]):
        with pytest.raises(ValueError, match="add up to the pixels"):
            RLE((2, 3), np.array(counts))
    with pytest.raises(ValueError, match="in the middle of a run"):
        RLE.from_text("T", (2, 3))
    with pytest.raises(ValueError, match="character"):
        RLE.from_text("6 ", (2, 3))
    with pytest.raises(ValueError, match="run-length code is"):
        RLE.from_json({"counts": "6"})
    with pytest.raises(ValueError, match="two axes"):
        _ = RLE.of(np.ones((2, 2, 2))).bbox
    with pytest.raises(ValueError, match="one shape"):
        rle.union([RLE.of(np.ones((2, 3))), RLE.of(np.ones((3, 2)))])
    with pytest.raises(ValueError, match="no mask"):
        rle.intersection([])

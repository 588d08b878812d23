import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg3d.inference import SubVolumes, slabs
from medseg3d.inference.slabs import Head, Slab, label_dtype, largest


def noise(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


@given(
    classes=st.integers(1, 300),
    voxels=st.integers(0, 40),
    values=st.integers(1, 6),
    block=st.sampled_from([1, 50, 1000, 2**18]),
    transposed=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**16),
)
@settings(deadline=None)
def test_the_first_of_the_largest(classes, voxels, values, block, transposed, dtype, seed):
    """With few values, so that nearly every voxel has a tie, infinities and zeros of both signs among them."""
    rng = np.random.default_rng(seed)
    chosen = rng.choice([-np.inf, -1, -0.0, 0.0, 1 / 3, np.inf], values)
    logits = rng.choice(chosen, (voxels, classes) if transposed else (classes, voxels))
    logits_KV = torch.from_numpy(logits.T if transposed else logits).to(dtype)
    before = logits_KV.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slabs, "BLOCK", block)
        labels, best = largest(logits_KV)
    assert torch.equal(logits_KV, before), "what is given is not written to"
    expected = logits_KV.double().numpy()
    assert labels.dtype == label_dtype(classes) and best.dtype == dtype
    np.testing.assert_array_equal(labels.numpy(), expected.argmax(0))
    np.testing.assert_array_equal(best.double().numpy(), expected.max(0))


def test_neighbouring_numbers_are_not_alike():
    """One unit in the last place decides, for tiny and for large logits."""
    for value in (1e-45, 1e-38, 1.0, 3e38):
        lower = torch.tensor([value, -value])
        upper = torch.nextafter(lower, torch.tensor(torch.inf))
        assert largest(torch.stack([lower, upper, lower]))[0].tolist() == [1, 1]


@pytest.mark.parametrize("place", [(0, 0), (4, 70), (6, 99)])
@pytest.mark.parametrize("block", [70, 2**18])
def test_what_is_not_a_number_is_refused(place, block, monkeypatch):
    monkeypatch.setattr(slabs, "BLOCK", block)
    logits_KV = noise(7, 100)
    logits_KV[place] = torch.nan
    with pytest.raises(ValueError, match="not a number"):
        largest(logits_KV)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("classes", [5, 300])
@pytest.mark.parametrize("block", [3, 700, 2**18])
def test_labels_of_a_slab_with_a_head_are_the_argmax_of_its_logits(classes, channels_last, block, monkeypatch):
    monkeypatch.setattr(slabs, "BLOCK", block)
    full = noise(9, 10, 11, 3).movedim(-1, 0) if channels_last else noise(3, 9, 10, 11)
    head = Head(noise(classes, 3, seed=1), noise(classes, seed=2))
    slab = Slab(1, 2, full[:, :, 2:7, 1:], head)
    assert torch.equal(slab.labels().long(), slab.logits().argmax(0))


@pytest.mark.parametrize("classes", [2, 9])
def test_no_more_logits_at_a_time_than_a_block(classes, monkeypatch):
    monkeypatch.setattr(slabs, "BLOCK", 90)
    slab = Slab(0, 0, noise(classes, 5, 6, 7))
    sizes = [logits.numel() for _, logits in slab.blocks()]
    assert max(sizes) <= 90 and sum(sizes) == slab.values.numel()


def test_one_channel_is_not_background_everywhere():
    with pytest.raises(ValueError, match="one channel has no argmax"):
        SubVolumes(8).label_map(noise(1, 1, 8, 8, 8), lambda window: window)

import pytest
import torch

from medseg3d.inference.stitching import RollingSlab


def noise(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("sums", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_of_another_type_than_the_windows(axis, channels_last, sums, given):
    """As if each window were converted as a whole, to the last bit, the ring's seam and odd sizes included."""
    windows = [[(start, start + 7) if a == axis else (1, 9) for a in range(2)] for start in (0, 3, 6)]
    weight = noise(*(stop - start for start, stop in windows[0]), seed=1).abs() + 0.1
    size = [13 if a == axis else 10 for a in range(2)]
    total, weights = torch.zeros(5, *size, dtype=sums), torch.zeros(size)
    slab, left = None, torch.zeros(5, *size, dtype=sums)
    for number, window in enumerate(windows):
        place = tuple(slice(*part) for part in window)
        output = noise(*weight.shape, 5, seed=number).movedim(-1, 0).to(given)
        output = output if channels_last else output.contiguous()
        before = output.clone()
        slab = slab or RollingSlab(output, size, axis, sums)
        slab.add(output, place, weight)
        assert torch.equal(output, before)
        total[(slice(None), *place)] = total[(slice(None), *place)].addcmul(output.to(sums), weight.to(sums))
        weights[place] += weight.to(sums)
        for first, values in slab.leave([3, 6, 13][number]):
            left.narrow(1 + axis, first, values.shape[1 + axis]).copy_(values)
    reached = (slice(None), *(slice(None) if a == axis else slice(1, 9) for a in range(2)))
    assert torch.equal(left[reached], (total / weights.to(sums))[reached])
    assert torch.isfinite(left[reached]).all() and left[reached].abs().min() > 0

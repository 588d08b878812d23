"""Windows come back as they went, whatever the sizes; gradients go the same way."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg3d.layers.windows import cut_into_windows, fitting_window

CPU = torch.device("cpu")


@st.composite
def cuts(draw):
    axes = draw(st.sampled_from([2, 3]))
    grid = tuple(draw(st.integers(1, 9)) for _ in range(axes))
    window = tuple(draw(st.integers(1, 5)) for _ in range(axes))
    shift = tuple(draw(st.integers(0, w // 2)) for w in window)
    return draw(st.integers(1, 3)), grid, *fitting_window(grid, window, shift)


@settings(max_examples=60, deadline=None)
@given(cuts())
def test_every_token_comes_back_and_padding_is_zero(cut):
    batch, grid, window, shift = cut
    windows = cut_into_windows(batch, grid, window, shift, CPU)
    x = torch.randn(batch, *grid, 2) + 10
    parts = windows.partition(x)
    assert torch.equal(windows.reverse(parts, like=x), x)
    assert sum(count for count, _ in windows.kinds) == len(parts)
    assert int((parts != 0).any(-1).sum()) == x[..., 0].numel()
    torch.testing.assert_close(parts.sum(), x.sum())


def test_gradients_go_back_to_the_token():
    windows = cut_into_windows(2, (5, 6), (3, 4), (1, 2), CPU)
    x = torch.randn(2, 5, 6, 3, requires_grad=True)
    weight = torch.randn(len(windows.index) // windows.tokens, windows.tokens, 3)
    (windows.partition(x) * weight).sum().backward()
    torch.testing.assert_close(x.grad, windows.reverse(weight, like=x))
    parts = weight.clone().requires_grad_()
    (windows.reverse(parts, like=x) * x.detach()).sum().backward()
    torch.testing.assert_close(parts.grad, windows.partition(x.detach()))


def test_tokens_of_two_ends_do_not_see_each_other():
    windows = cut_into_windows(1, (4, 4), (2, 2), (1, 1), CPU)
    assert [count for count, _ in windows.kinds] == [1, 1, 1, 1]
    masks = [mask for _, mask in windows.kinds]
    assert masks[0] is None
    # The last window along both axes joins the four corners.
    assert torch.equal(masks[3] == 0, torch.eye(4, dtype=torch.bool))


def test_what_was_cut_without_gradients_serves_training():
    with torch.inference_mode():
        cut_into_windows(1, (7, 5), (3, 3), (1, 1), CPU)
    x = torch.randn(1, 7, 5, 2, requires_grad=True)
    cut_into_windows(1, (7, 5), (3, 3), (1, 1), CPU).partition(x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))

"""The side of their kink on which leaky ReLUs work, which makes the gradients of two computations comparable."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn import functional

Kink = tuple[tuple[int, ...], tuple[int, ...]]
# Shape and index of the inputs that the reference's float32 run had on the other side than float64 has them.
KINKS: dict[str, list[Kink]] = {
    "unetr_small": [((1, 32, 16, 8, 12), (0, 20, 14, 6, 2)), ((1, 16, 32, 16, 24), (0, 7, 5, 4, 17))],
    "swin_f12_v2": [((1, 12, 64, 64, 64), (0, 1, 48, 45, 51))],
}


class Sides:
    """The side of zero on which the inputs of leaky ReLUs and PReLUs lie where rounding could move them across it.

    The gradient jumps there, so that float32 runs on two processors differ by more than the gradients' tolerance. On
    the same sides they agree within it: the sides of float64, but for the inputs that the reference's own float32 run
    had ``crossed``. (They were found by the gradients: crossed one by one, they account for every stored value.)
    """

    REACH = 5e-5  # more than float32 and float64 ever differ by here, at a scale of 1

    def __init__(self, network: nn.Module, x: torch.Tensor, crossed: Sequence[Kink] = ()) -> None:
        self.near: dict[int, tuple[tuple[torch.Tensor, ...], torch.Tensor]] = {}
        crossed = list(crossed)

        def record(number: int, x: torch.Tensor) -> None:
            where = (x.abs() < self.REACH).nonzero(as_tuple=True)
            positive = x[where] > 0
            for shape, index in list(crossed):
                if tuple(x.shape) == shape and abs(float(x.detach()[index])) < 3e-6:
                    crossed.remove((shape, index))
                    here = torch.stack([axis == i for axis, i in zip(where, index, strict=True)]).all(0)
                    positive[here] = ~positive[here]
            self.near[number] = where, positive

        with at_kinks(record):
            network(x)
        assert not crossed, f"no input near zero at {crossed}"

    def forced(self) -> AbstractContextManager[None]:
        def put(number: int, x: torch.Tensor) -> None:
            where, positive = self.near[number]
            x.detach()[where] = torch.where(positive, 1e-12, -1e-12).to(x.dtype)

        return at_kinks(put)


@contextmanager
def at_kinks(visit: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    """``visit`` gets the number and the input of every leaky ReLU and PReLU before it is applied, and may change it."""
    numbers = itertools.count()

    def visiting(activation: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def visited(x: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
            visit(next(numbers), x)
            return activation(x, *arguments, **named)

        return visited

    with ExitStack() as patches:
        for name in ("leaky_relu", "leaky_relu_", "prelu"):
            patches.enter_context(mock.patch.object(functional, name, visiting(getattr(functional, name))))
        yield

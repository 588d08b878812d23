"""The arithmetic of convolution, attention and patch embedding, from sizes alone.

MACs are multiply-adds and FLOPs twice as many; biases are neither counted as operations nor among ``weights``. Sizes
have any number of axes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

Size = tuple[int, ...]


class ClosedForm(ABC):
    """What is known by formula; ``figures`` are all of its numbers by name."""

    _figures: tuple[str, ...] = ()

    @property
    @abstractmethod
    def macs(self) -> int:
        """Multiply-adds."""

    @property
    def flops(self) -> int:
        """Floating-point operations: two for each multiply-add."""
        return 2 * self.macs

    @property
    def figures(self) -> dict[str, Any]:
        """Name -> number, or a size."""
        return {name: getattr(self, name) for name in (*self._figures, "macs", "flops")}


@dataclass(frozen=True)
class Convolution(ClosedForm):
    """A convolution: each of its weights takes part once at each position.

    MACs = positions * weights, weights = out * (in / groups) * taps; positions are those of the output, or of the input
    of a transposed convolution (Dumoulin and Visin, "A guide to convolution arithmetic for deep learning", 2016,
    relationships 13 to 15).

    Args:
        in_channels, out_channels: widths.
        kernel: taps along each axis.
        size: of the input, along each axis.
        stride, dilation: along each axis, or one number for all.
        padding: zeros on both sides of each axis, or one number for all; "same" keeps the size at stride 1.
        groups: groups of channels that do not see each other.
        transposed: whether the convolution makes its input larger.

    Raises:
        ValueError: the channels are not multiples of the groups, axes do not go together, a number is out of range, or
            the input is smaller than the kernel.
    """

    in_channels: int
    out_channels: int
    kernel: Sequence[int]
    size: Sequence[int]
    stride: int | Sequence[int] = 1
    padding: int | Sequence[int] | str = 0
    dilation: int | Sequence[int] = 1
    groups: int = 1
    transposed: bool = False

    _figures = ("output_size", "taps", "weights", "biases")

    def __post_init__(self) -> None:
        _positive(channels=(self.in_channels, self.out_channels), kernel=self.kernel, size=self.size)
        _positive(groups=(self.groups,), stride=self._each("stride"), dilation=self._each("dilation"))
        if self.in_channels % self.groups or self.out_channels % self.groups:
            raise ValueError(
                f"channels must be multiples of the groups, got {self.in_channels} in, {self.out_channels} out and "
                f"{self.groups} groups"
            )
        if len(self.kernel) != len(self.size):
            raise ValueError(
                f"kernel and size need a number for each of the same axes, got {tuple(self.kernel)} and "
                f"{tuple(self.size)}"
            )
        if min(self.output_size) < 1:
            raise ValueError(f"a kernel of {tuple(self.kernel)} does not fit into an input of {tuple(self.size)}")

    @property
    def output_size(self) -> Size:
        """Positions of the output along each axis."""
        reach = [d * (k - 1) for d, k in zip(self._each("dilation"), self.kernel, strict=True)]
        if self.padding == "same":
            edges = tuple(reach)
        else:
            edges = tuple(2 * p for p in self._each("padding"))
        each = zip(self.size, reach, edges, self._each("stride"), strict=True)
        if self.transposed:
            return tuple((n - 1) * s + r + 1 - e for n, r, e, s in each)
        return tuple((n + e - r - 1) // s + 1 for n, r, e, s in each)

    @property
    def taps(self) -> int:
        return prod(self.kernel)

    @property
    def weights(self) -> int:
        return self.taps * self.in_channels * self.out_channels // self.groups

    @property
    def biases(self) -> int:
        return self.out_channels

    @property
    def macs(self) -> int:
        return prod(self.size if self.transposed else self.output_size) * self.weights

    def _each(self, name: str) -> Size:
        value = getattr(self, name)
        values = (value,) * len(self.size) if isinstance(value, int) else tuple(value)
        if isinstance(value, str) or len(values) != len(self.size):
            raise ValueError(f"{name} needs one number, or one for each of {len(self.size)} axes, got {value!r}")
        return values


@dataclass(frozen=True)
class Attention(ClosedForm):
    """One layer of self-attention over a grid of tokens, or over windows of it.

    Of L tokens of width d: queries, keys, values and the projection of the result are four products with d x d weights,
    8 d^2 L FLOPs; scores and the weighted sum are 2 d L^2 each, 4 d L^2 together, however many the heads (Vaswani et
    al., "Attention is all you need", NeurIPS 2017, section 3.2). Windows of M tokens need 4 d L M instead (Liu et al.,
    "Swin transformer", ICCV 2021, equations 1 and 2, which count MACs). A grid is first padded to whole windows; an
    axis no longer than the window is one window, as in Swin.

    Args:
        grid: tokens along each axis; (L,) for a row of them.
        width: d.
        window: tokens of a window along each axis; None for attention among all.

    Raises:
        ValueError: a number is less than 1, or the window has other axes than the grid.
    """

    grid: Sequence[int]
    width: int
    window: Sequence[int] | None = None

    _figures = (
        *("padded", "tokens", "windows", "tokens_per_window", "weights"),
        *("linear_flops", "quadratic_flops", "scores_per_head"),
    )

    def __post_init__(self) -> None:
        _positive(tokens=self.grid, width=(self.width,), window=self.window or (1,))
        if self.window is not None and len(self.window) != len(self.grid):
            raise ValueError(
                f"a window needs a number for each of the grid's {len(self.grid)} axes, got {tuple(self.window)}"
            )

    @property
    def _window(self) -> Size:
        window = self.grid if self.window is None else self.window
        return tuple(min(n, w) for n, w in zip(self.grid, window, strict=True))

    @property
    def padded(self) -> Size:
        """The grid in whole windows."""
        return tuple(-(-n // w) * w for n, w in zip(self.grid, self._window, strict=True))

    @property
    def tokens(self) -> int:
        """L, those of the padding included."""
        return prod(self.padded)

    @property
    def tokens_per_window(self) -> int:
        """M."""
        return prod(self._window)

    @property
    def windows(self) -> int:
        return self.tokens // self.tokens_per_window

    @property
    def weights(self) -> int:
        return 4 * self.width**2

    @property
    def linear_flops(self) -> int:
        """8 d^2 L."""
        return 8 * self.width**2 * self.tokens

    @property
    def quadratic_flops(self) -> int:
        """4 d L M."""
        return 4 * self.width * self.tokens * self.tokens_per_window

    @property
    def scores_per_head(self) -> int:
        """Entries of the score matrices of one head, L M: what the memory grows with."""
        return self.tokens * self.tokens_per_window

    @property
    def macs(self) -> int:
        return (self.linear_flops + self.quadratic_flops) // 2


@dataclass(frozen=True)
class PatchEmbedding(ClosedForm):
    """A volume cut into patches, each a vector that one matrix makes a token of (Dosovitskiy et al., "An image is worth
    16x16 words", ICLR 2021, equation 1).

    UNETR has patches of 16 voxels and tokens of width 768, Swin UNETR patches of 2 and width 24 or 48.

    Args:
        size: voxels along each axis.
        channels: of the volume.
        patch: edge of a patch.
        width: of a token.

    Raises:
        ValueError: a number is less than 1, or the size no multiple of the patch.
    """

    size: Sequence[int]
    channels: int
    patch: int
    width: int

    _figures = ("grid", "tokens", "patch_vector", "weights")

    def __post_init__(self) -> None:
        _positive(size=self.size, channels=(self.channels,), patch=(self.patch,), width=(self.width,))
        if any(n % self.patch for n in self.size):
            good = tuple(-(-n // self.patch) * self.patch for n in self.size)
            raise ValueError(f"sizes must be multiples of the patch {self.patch}, got {tuple(self.size)}; next: {good}")

    @property
    def grid(self) -> Size:
        """Tokens along each axis."""
        return tuple(n // self.patch for n in self.size)

    @property
    def tokens(self) -> int:
        return prod(self.grid)

    @property
    def patch_vector(self) -> int:
        """Numbers in a patch."""
        return self.channels * self.patch ** len(self.size)

    @property
    def weights(self) -> int:
        return self.patch_vector * self.width

    @property
    def macs(self) -> int:
        return self.tokens * self.weights


def swin_stages(
    size: Sequence[int], width: int = 48, window: int = 7, patch: int = 2, stages: int = 4
) -> tuple[Attention, ...]:
    """One layer of attention in each stage of Swin UNETR: half the tokens along each axis, and twice the width.

    Hatamizadeh et al., "Swin UNETR", BrainLes 2021, section 3.1.

    Args:
        size: voxels along each axis.
        width: of the first stage's tokens, the network's ``feature_size``.
        window, patch: their edges, in tokens and voxels.
        stages: how many.

    Raises:
        ValueError: the size is not a multiple of the patch, or a number is less than 1.
    """
    _positive(stages=(stages,))
    grid = PatchEmbedding(size, 1, patch, width).grid
    found = []
    for stage in range(stages):
        found.append(Attention(grid, width * 2**stage, (window,) * len(grid)))
        grid = tuple(-(-n // 2) for n in grid)
    return tuple(found)


def _positive(**numbers: Sequence[int]) -> None:
    for name, values in numbers.items():
        if not len(values) or min(values) < 1:
            raise ValueError(f"{name} must be 1 or more, got {' '.join(map(str, values)) or 'none'}")

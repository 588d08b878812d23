"""How far a network sees: the receptive field and the stride of its output, along each axis.

The network runs on a tensor without values, and for each entry of each map the first and the last voxel of the input
that reach it are followed through convolutions, poolings, interpolation, crops, skips and matrix products of channels:
exactly, since an entry behind a transposed convolution sees more or less than its neighbour does. For a mere chain the
same is a formula (Araujo, Norris and Sim, "Computing receptive fields of convolutional neural networks", Distill 2019),
see ``medseg3d.layers.sampling``.

Norms count as if they looked at a voxel alone. What mixes voxels in any other way, attention for one, is taken to see
everything, which for windowed attention is an upper bound.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import prod
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from medseg3d.flops.counting import on_meta

_LONGEST = 4096  # voxels along an axis
_NOWHERE = 2**40  # first voxel of what sees none, such as padding


@dataclass(frozen=True)
class Reach:
    """How far a network sees.

    Attributes:
        field: voxels along each axis that an entry of the output depends on, at most; None for all that there are.
        stride: voxels of the input from one entry of the output to the next.
        coarsest: the same of the coarsest map on the way.
        because: what sees everything; empty if nothing does.
    """

    field: tuple[int | None, ...]
    stride: tuple[Fraction, ...]
    coarsest: tuple[Fraction, ...]
    because: str = ""


@dataclass(frozen=True)
class _Seen:
    """What the entries of a map see along one axis of the image: voxels ``first`` to ``last`` (N,), and its step."""

    first: torch.Tensor
    last: torch.Tensor
    step: Fraction

    def gathered(self, entries: torch.Tensor, step: Fraction) -> _Seen:
        """Of a new map whose entries see what these ``entries`` (N, taps) see; those outside are padding."""
        inside = (entries >= 0) & (entries < len(self.first))
        taken = entries.clamp(0, len(self.first) - 1)
        first = torch.where(inside, self.first[taken], _NOWHERE).amin(1)
        return _Seen(first, torch.where(inside, self.last[taken], -1).amax(1), step)

    def windowed(self, size: int, kernel: int, stride: int, padding: int, dilation: int) -> _Seen:
        starts = torch.arange(size)[:, None] * stride - padding
        return self.gathered(starts + dilation * torch.arange(kernel), self.step * stride)

    def transposed(self, size: int, kernel: int, stride: int, padding: int, dilation: int) -> _Seen:
        places = torch.arange(size)[:, None] + padding - dilation * torch.arange(kernel)
        entries = torch.where(places % stride == 0, places // stride, -1)
        return self.gathered(entries, self.step / stride)

    def nearest(self, size: int) -> _Seen:
        """By the nearest entry, as PyTorch rounds."""
        entries = torch.arange(size) * len(self.first) // size
        return self.gathered(entries[:, None], self.step * Fraction(len(self.first), size))

    def interpolated(self, size: int, aligned: bool) -> _Seen:
        """By both neighbours of a place that is not an entry's own; ``aligned`` at the ends' centres, else at edges."""
        old, each = len(self.first), torch.arange(size)
        place, unit = (each * (old - 1), max(size - 1, 1)) if aligned else ((2 * each + 1) * old - size, 2 * size)
        entries = torch.stack([place // unit, -(-place // unit)], dim=1).clamp(0, old - 1)
        return self.gathered(entries, self.step * Fraction(old, size))

    def joined(self, other: _Seen) -> _Seen:
        return _Seen(self.first.minimum(other.first), self.last.maximum(other.last), min(self.step, other.step))


@dataclass(frozen=True)
class _Trace:
    """What a tensor sees. ``axes`` are the axes of the image, by the dimension of ``shape`` that they lie along.

    ``shape`` is the tensor's own, or the one it had before its leading dimensions were made one for a matrix product.
    """

    shape: tuple[int, ...]
    axes: dict[int, int]
    seen: tuple[_Seen, ...]


def receptive_field(network: nn.Module, shape: Sequence[int]) -> Reach:
    """How far a network sees in evaluation mode; the network is not changed.

    Args:
        network: called on one tensor; the first tensor that it gives is its output.
        shape: (B, C, *spatial) of an input that it takes. Twice the size, and twice that, is tried until the field no
            longer ends with the image.

    Raises:
        ValueError: the network does not take that input, or what it does depends on values.
    """
    trace, watch = _followed(network, shape)
    while trace is not None and not all(map(_is_inside, trace.seen, shape[2:])) and 2 * max(shape[2:]) <= _LONGEST:
        shape = (*shape[:2], *(2 * size for size in shape[2:]))
        try:
            trace, watch = _followed(network, shape)
        except ValueError:  # a network of one size
            break
    if trace is None:
        return Reach((None,) * len(watch.coarsest), watch.stride, watch.coarsest, watch.because)
    field = tuple(_field(seen, size) for seen, size in zip(trace.seen, shape[2:], strict=True))
    because = "" if all(field) else "the largest input that it takes"
    return Reach(field, tuple(seen.step for seen in trace.seen), watch.coarsest, because)


def _followed(network: nn.Module, shape: Sequence[int]) -> tuple[_Trace | None, _Following]:
    # Where gradients are recorded, networks write nothing over what they have, so that nothing has to be followed back.
    with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
        inputs = torch.empty(tuple(shape), device="meta")
        copy = on_meta(network).eval()
        following = _Following(inputs)
        try:
            with following:
                outputs = copy(inputs)
        except NotImplementedError as error:
            raise ValueError(
                f"how far {type(network).__name__} sees depends on the picture: ask it of its backbone"
            ) from error
        except RuntimeError as error:
            raise ValueError(f"{type(network).__name__} does not take an input of {tuple(shape)}: {error}") from error
    output = next(leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor))
    following.stride = tuple(Fraction(n, m) for n, m in zip(shape[2:], output.shape[2:], strict=False))
    return following.trace_of(output), following


def _is_inside(seen: _Seen, size: int) -> bool:
    """Whether the entry in the middle sees an end of the image neither on the left nor on the right."""
    middle = len(seen.first) // 2
    return bool(seen.first[middle] > 0 and seen.last[middle] < size - 1)


def _field(seen: _Seen, size: int) -> int | None:
    inside = (seen.first > 0) & (seen.last < size - 1)
    if not inside.any():
        return None
    return int((seen.last - seen.first + 1)[inside].max())


class _Following(TorchDispatchMode):
    """Keeps a trace of each tensor that depends on the image; None stands for one that sees everything."""

    def __init__(self, image: torch.Tensor) -> None:
        super().__init__()
        self.traces: Any = WeakIdKeyDictionary()
        seen = tuple(_Seen(torch.arange(n), torch.arange(n), Fraction(1)) for n in image.shape[2:])
        self.traces[image] = _Trace(tuple(image.shape), {2 + axis: axis for axis in range(len(seen))}, seen)
        self.coarsest = self.stride = (Fraction(1),) * len(seen)
        self.because = ""

    def trace_of(self, tensor: torch.Tensor) -> _Trace | None:
        return self.traces.get(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sources = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        makes_fresh = func.overloadpacket.__name__.startswith(_FRESH)
        known = [source for source in sources if source in self.traces and not makes_fresh]
        if known:
            outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            for output in outputs[:1] if func.overloadpacket.__name__ in _WITH_EXTRAS else outputs:
                self.traces[output] = self._trace(func, args, known, output)
            if func._schema.is_mutable and args[0]._is_view():
                self.traces[args[0]._base] = None
                self.because = self.because or "writing into a part of a tensor"
        return result

    def _trace(self, func: Any, args: Any, sources: list[torch.Tensor], output: torch.Tensor) -> _Trace | None:
        traces = [self.traces[source] for source in sources]
        if None in traces:
            return None
        name = func.overloadpacket.__name__
        rule = _RULES.get(name, _elementwise if torch.Tag.pointwise in func.tags else None)
        trace = rule(traces, args, tuple(output.shape)) if rule else None
        if trace is None:
            self.because = self.because or _WORDS.get(name, name)
            return None
        steps = zip(self.coarsest, (seen.step for seen in trace.seen), strict=True)
        self.coarsest = tuple(max(pair) for pair in steps)
        return trace


# Each rule makes the trace of an operation's output from those of its inputs, its arguments and the output's shape;
# None where it cannot follow.
_Rule = Callable[[list[_Trace], Any, tuple[int, ...]], _Trace | None]
_WORDS = {"view": "making tokens of voxels", "bmm": "attention", "scatter": "unpooling", "mean": "a mean of all voxels"}


def _per_axis(value: Any, count: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * count if len(values) == 1 else values


def _windows(trace: _Trace, shape: tuple[int, ...], step: Callable[[_Seen, int, int], _Seen]) -> _Trace | None:
    """``step(seen, number of the axis counted from the end, size)`` on each spatial dimension."""
    if trace.axes and min(trace.axes) < 2:  # where images and channels are expected
        return None
    return _by_dimension(trace, shape, lambda seen, dim: step(seen, dim - len(shape), shape[dim]))


def _convolution(traces: list[_Trace], args: Any, shape: tuple[int, ...]) -> _Trace | None:
    kernel, count = args[1].shape[2:], len(shape) - 2
    stride, padding, dilation = (_per_axis(value, count) for value in args[3:6])
    move = _Seen.transposed if args[6] else _Seen.windowed
    return _windows(
        traces[0], shape, lambda seen, i, size: move(seen, size, kernel[i], stride[i], padding[i], dilation[i])
    )


def _pooling(traces: list[_Trace], args: Any, shape: tuple[int, ...]) -> _Trace | None:
    count = len(shape) - 2
    kernel = _per_axis(args[1], count)
    stride = _per_axis(args[2], count) if len(args) > 2 and args[2] else kernel
    padding = _per_axis(args[3], count) if len(args) > 3 else [0] * count
    # The fourth is dilation in a max pooling and ceil_mode, a bool, in an average.
    dilated = len(args) > 4 and not isinstance(args[4], bool)
    dilation = _per_axis(args[4], count) if dilated else [1] * count
    return _windows(
        traces[0],
        shape,
        lambda seen, i, size: seen.windowed(size, kernel[i], stride[i], padding[i], dilation[i]),
    )


def _nearest(traces: list[_Trace], args: Any, shape: tuple[int, ...]) -> _Trace | None:
    return _windows(traces[0], shape, lambda seen, _, size: seen.nearest(size))


def _interpolation(traces: list[_Trace], args: Any, shape: tuple[int, ...]) -> _Trace | None:
    return _windows(traces[0], shape, lambda seen, _, size: seen.interpolated(size, aligned=args[2]))


def _padding(traces: list[_Trace], args: Any, shape: tuple[int, ...]) -> _Trace | None:
    pads = args[1]

    def padded(seen: _Seen, dim: int) -> _Seen:
        before = pads[2 * (len(shape) - 1 - dim)] if 2 * (len(shape) - 1 - dim) < len(pads) else 0
        return seen.gathered((torch.arange(shape[dim]) - before)[:, None], seen.step)

    return _by_dimension(traces[0], shape, padded)


def _slice(traces: list[_Trace], args: Any, shape: tuple[int, ...]) -> _Trace | None:
    dim, step = (args[1] if len(args) > 1 else 0) % len(shape), args[4] if len(args) > 4 else 1
    start = (args[2] or 0) if len(args) > 2 else 0
    size = traces[0].shape[dim]
    start = min(max(start + size * (start < 0), 0), size)

    def cut(seen: _Seen, at: int) -> _Seen:
        entries = start + step * torch.arange(shape[at])
        return seen.gathered(entries[:, None], seen.step * step) if at == dim else seen

    return _by_dimension(traces[0], shape, cut)


def _by_dimension(trace: _Trace, shape: tuple[int, ...], step: Callable[[_Seen, int], _Seen]) -> _Trace | None:
    if len(trace.shape) != len(shape):
        return None
    seen = list(trace.seen)
    for dim, axis in trace.axes.items():
        seen[axis] = step(seen[axis], dim)
    return _Trace(shape, trace.axes, tuple(seen))


def _elementwise(traces: list[_Trace], args: Any, shape: tuple[int, ...]) -> _Trace | None:
    """Tensors that are alike, be it in matrix form, or that are broadcast to the output's shape."""
    first = traces[0]
    if any((other.shape, other.axes) != (first.shape, first.axes) for other in traces):
        if torch.broadcast_shapes(*(trace.shape for trace in traces)) != shape:
            return None
        widened = [_broadcast(trace, shape) for trace in traces]
        if any(trace.axes != widened[0].axes for trace in widened):
            return None
        first, *traces = widened
    seen = first.seen
    for other in traces:
        seen = tuple(map(_Seen.joined, seen, other.seen))
    return replace(first, seen=seen) if prod(shape) == prod(first.shape) else None


def _broadcast(trace: _Trace, shape: tuple[int, ...]) -> _Trace:
    axes = {dim + len(shape) - len(trace.shape): axis for dim, axis in trace.axes.items()}
    seen = list(trace.seen)
    for dim, axis in axes.items():
        if len(seen[axis].first) != shape[dim]:
            seen[axis] = seen[axis].gathered(torch.zeros(shape[dim], 1, dtype=torch.long), seen[axis].step)
    return _Trace(shape, axes, tuple(seen))


def _concatenation(traces: list[_Trace], args: Any, shape: tuple[int, ...]) -> _Trace | None:
    dim = args[1] % len(shape) if len(args) > 1 else 0
    if any(dim in trace.axes or len(trace.shape) != len(shape) for trace in traces):
        return None
    alike = [replace(trace, shape=shape) for trace in traces]
    return _elementwise(alike, args, shape)


def _split(traces: list[_Trace], args: Any, shape: tuple[int, ...]) -> _Trace | None:
    dim = args[2] % len(shape) if len(args) > 2 else 0
    (trace,) = traces
    return replace(trace, shape=shape) if dim not in trace.axes and len(trace.shape) == len(shape) else None


def _permutation(traces: list[_Trace], args: Any, shape: tuple[int, ...]) -> _Trace | None:
    return _reordered(traces[0], [dim % len(shape) for dim in args[1]])


def _transposition(traces: list[_Trace], args: Any, shape: tuple[int, ...]) -> _Trace | None:
    order = list(range(len(shape)))
    one, other = args[1], args[2]
    order[one], order[other] = order[other], order[one]
    return _reordered(traces[0], order)


def _reordered(trace: _Trace, order: list[int]) -> _Trace | None:
    if len(trace.shape) != len(order):
        return None
    axes = {order.index(dim): axis for dim, axis in trace.axes.items()}
    return _Trace(tuple(trace.shape[dim] for dim in order), axes, trace.seen)


def _view(traces: list[_Trace], args: Any, shape: tuple[int, ...]) -> _Trace | None:
    """Each axis stays a dimension; or all but the last become one; or what was made one is taken apart again."""
    (trace,) = traces
    places = {(prod(shape[:dim]), size): dim for dim, size in reversed(list(enumerate(shape)))}
    axes = {places.get((prod(trace.shape[:dim]), trace.shape[dim])): axis for dim, axis in trace.axes.items()}
    if None not in axes and len(axes) == len(trace.axes):
        return _Trace(shape, axes, trace.seen)  # type: ignore[arg-type]
    rows = (prod(trace.shape[:-1]), trace.shape[-1])
    return trace if shape == rows and len(trace.shape) - 1 not in trace.axes else None


def _product(traces: list[_Trace], args: Any, shape: tuple[int, ...]) -> _Trace | None:
    """Of rows, one a voxel, with weights."""
    (trace, *more) = traces
    if more or len(trace.shape) - 1 in trace.axes or shape[0] != prod(trace.shape[:-1]):
        return None
    return replace(trace, shape=(*trace.shape[:-1], shape[-1]))


_FRESH = ("new_", "empty", "zeros", "ones", "full", "rand")  # values that no other tensor has a part in
_WITH_EXTRAS = {  # operations that give more than their result: statistics, or where a maximum was
    *("native_batch_norm", "native_group_norm", "native_layer_norm"),
    *("max_pool2d_with_indices", "max_pool3d_with_indices"),
}
_RULES: dict[str, _Rule] = {
    "convolution": _convolution,
    **dict.fromkeys(("max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool2d", "avg_pool3d"), _pooling),
    **dict.fromkeys(("upsample_nearest2d", "upsample_nearest3d"), _nearest),
    **dict.fromkeys(("upsample_bilinear2d", "upsample_trilinear3d"), _interpolation),
    "constant_pad_nd": _padding,
    "slice": _slice,
    "cat": _concatenation,
    **dict.fromkeys(("split", "split_with_sizes"), _split),
    "permute": _permutation,
    "transpose": _transposition,
    **dict.fromkeys(("view", "_unsafe_view", "unsqueeze", "squeeze"), _view),
    **dict.fromkeys(("mm", "addmm"), _product),
    **dict.fromkeys(("native_batch_norm", "native_group_norm", "native_layer_norm"), _elementwise),
    **dict.fromkeys(("_prelu_kernel", "detach", "alias"), _elementwise),
}

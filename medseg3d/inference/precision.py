"""The precision in which a network runs, and whether it still gives the labels of float32.

bfloat16 takes half the memory and, where the hardware multiplies it, far less time. But some operations of some
releases of PyTorch, oneDNN and cuDNN are wrong in it, and some networks do not bear it. So nothing is taken for
granted, and one window of the scan at hand goes through the network in both.

Shape legend: image_BC... and window_BC... are (batch, channels, *spatial axes), logits_BK... are (batch, classes,
*spatial axes).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from medseg3d.inference.slabs import largest

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
_DTYPES = {"auto": torch.bfloat16, "bf16": torch.bfloat16, "fp16": torch.float16}
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
# Private names of PyTorch: where one is gone, the processor is taken not to have it.
_CPU_HAS_BFLOAT16 = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")


@dataclass(frozen=True)
class Agreement:
    """How close a window's logits in a lower precision are to those in float32.

    Attributes:
        labels: share of voxels with the same label, 0 to 1.
        error: norm of the difference relative to the norm of the float32 logits.
        finite: whether all logits of both are finite; if not, ``labels`` is 0 and ``error`` is infinite.
    """

    labels: float
    error: float
    finite: bool = True

    def __str__(self) -> str:
        if not self.finite:
            return "logits that are not finite"
        return f"{100 * self.labels:.2f} % of a window's labels as in float32, logits off by {100 * self.error:.2g} %"


@dataclass(frozen=True)
class Precision:
    """What :func:`choose_precision` decided.

    Attributes:
        dtype: torch.float32, torch.bfloat16 or torch.float16.
        reason: why, in words for a report.
        agreement: of the last lower precision that was tried on the window, even where it was not taken.
        autocast: run with ``torch.autocast`` instead of weights that were cast once.
    """

    dtype: torch.dtype
    reason: str
    agreement: Agreement | None = None
    autocast: bool = False


def check_precision(wanted: str, device: torch.device) -> None:
    """ValueError where no network runs in the precision: it is unknown, or "fp16" on a CPU."""
    if wanted not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {wanted!r}")
    if wanted == "fp16" and device.type == "cpu":
        raise ValueError(
            "precision 'fp16' needs a GPU: CPUs are slow in it and its sums overflow; take 'bf16' or 'fp32'"
        )


def choose_precision(
    network: Callable,
    window_BC: torch.Tensor,
    device: str | torch.device = "cpu",
    wanted: str = "auto",
    min_labels: float = 0.99,
    max_error: float = 5e-2,
) -> Precision:
    """The precision for a network on a device, tried on one window; ``in_precision`` then makes the network.

    "auto" takes bfloat16 where the hardware multiplies it (CUDA devices that have it, CPUs with AMX or AVX512-BF16) and
    the window agrees with float32, and float32 otherwise; ``reason`` tells why. "bf16" and "fp16" are taken as long as
    the network runs in them; a window that disagrees is told in ``reason``. The network is not changed. Unless there is
    nothing to try, this costs the time of two or three windows and the memory of a second copy of the weights.

    Args:
        network: on ``device``, in evaluation mode. Its first tensor is what is compared, if it returns several.
        window_BC: a window as the strategy gives it to the network, best one with much in it
            (:func:`representative_window`): in air everything agrees.
        device: where the network runs.
        wanted: "auto", "fp32", "bf16" or "fp16".
        min_labels: share of labels that must agree.
        max_error: largest relative error of the logits.

    Raises:
        ValueError: ``wanted`` is unknown, it is "fp16" on a CPU, or the network does not run in it.
    """
    device = torch.device(device)
    check_precision(wanted, device)
    if wanted == "fp32":
        return Precision(torch.float32, "float32 was asked for")
    if wanted == "auto":
        missing = _why_no_bfloat16(device)
        if missing:
            return Precision(torch.float32, f"float32: {missing}")
    dtype, window_BC = _DTYPES[wanted], window_BC.to(device)
    tried: list[tuple[bool, Agreement]] = []
    problem = ""
    with torch.inference_mode():
        full_BK = _first_tensor(in_precision(network, torch.float32)(window_BC.clone()))
        for autocast in (False, True) if _castable(network) else (True,):
            try:
                low_BK = _first_tensor(in_precision(network, dtype, autocast)(window_BC.clone()))
            except (RuntimeError, TypeError) as error:  # types that do not go together, mostly
                problem = str(error).partition("\n")[0]
                continue
            found = agreement(low_BK, full_BK)
            if found.labels >= min_labels and found.error <= max_error:
                return Precision(dtype, f"{_spelled(dtype, autocast)}: {found}", found, autocast)
            tried.append((autocast, found))
    limits = f"labels must agree to {100 * min_labels:g} % and logits to {100 * max_error:g} %"
    return _without_agreement(dtype, wanted == "auto", tried, problem, limits)


def _without_agreement(
    dtype: torch.dtype, automatic: bool, tried: list[tuple[bool, Agreement]], problem: str, limits: str
) -> Precision:
    """What is left where no way to run in ``dtype`` agrees with float32: that, where it was asked for and runs."""
    name = _NAMES[dtype]
    if tried and automatic:
        return Precision(torch.float32, f"float32: {name} gave {tried[-1][1]}; {limits}", tried[-1][1])
    if tried:
        autocast, found = tried[0]
        return Precision(dtype, f"{_spelled(dtype, autocast)} as asked for, with {found}; {limits}", found, autocast)
    if automatic:
        return Precision(torch.float32, f"float32: the network does not run in {name}: {problem}")
    raise ValueError(f"the network does not run in {name}, take precision 'fp32': {problem}")


def _spelled(dtype: torch.dtype, autocast: bool) -> str:
    return f"{_NAMES[dtype]} by autocast" if autocast else _NAMES[dtype]


def in_precision(network: Callable, dtype: torch.dtype, autocast: bool | None = None) -> Callable:
    """The network as a callable that computes in ``dtype``; the network itself is not changed.

    A module gets a copy whose weights are cast once, and its windows are cast too; one whose weights already have that
    type is not copied, and in float32 it is returned as it is. TorchScript and other callables, whose weights cannot be
    cast safely, run with ``torch.autocast``, and in float32 as they are.

    Logits stay in the type that the network gives: strategies add windows in float32 anyway, so a cast here would only
    move twice the bytes.

    Args:
        network: a module or any callable.
        dtype: torch.float32, torch.bfloat16 or torch.float16.
        autocast: run with ``torch.autocast`` (True) or cast the weights (False); by default as above.
    """
    if autocast is None:
        autocast = not _castable(network)
    if autocast or not isinstance(network, nn.Module):
        return network if dtype == torch.float32 else InPrecision(network, dtype, autocast=True)
    if _has_dtype(network, dtype):
        return network if dtype == torch.float32 else InPrecision(network, dtype)
    return InPrecision(_cast(network, dtype), dtype)


class InPrecision(nn.Module):
    """A network that gets its windows in ``dtype``, or runs within ``torch.autocast``.

    Args:
        network: with weights of that type, or for autocast of any.
        dtype: of the windows, or of autocast.
        autocast: leave the windows and let autocast choose by operation.
    """

    def __init__(self, network: Callable, dtype: torch.dtype, autocast: bool = False) -> None:
        super().__init__()
        self.network = network
        self.dtype = dtype
        self.autocast = autocast
        self.training = getattr(network, "training", False)

    def forward(self, window_BC: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.autocast:
            with torch.autocast(window_BC.device.type, self.dtype):
                return self.network(window_BC, *args, **kwargs)
        return self.network(window_BC.to(self.dtype), *args, **kwargs)


def agreement(low_BK: torch.Tensor, full_BK: torch.Tensor) -> Agreement:
    """How close logits (B, K, *spatial) are to those in float32. A single channel has the labels above 0 and below."""
    low, full = low_BK.float(), full_BK.float()
    if not (low.isfinite().all() and full.isfinite().all()):
        return Agreement(0.0, float("inf"), False)
    difference, norm = float((low - full).norm()), float(full.norm())
    equal = [(_labels(a) == _labels(b)).float().mean() for a, b in zip(low, full, strict=True)]
    error = difference / norm if norm else float("inf") if difference else 0.0
    return Agreement(float(torch.stack(equal).mean()), error)


def representative_window(
    image_BC: torch.Tensor,
    roi_size: Sequence[int | None] | int,
    per_axis: int = 3,
    padding_value: float = 0.0,
) -> torch.Tensor:
    """The window (1, C, *roi_size) in which values vary most, among a few evenly placed ones; a copy.

    That is one with tissue, edges and air rather than air alone. Variation is the standard deviation of a channel,
    averaged over channels.

    Args:
        image_BC: (B, C, *spatial); of several images, one is chosen.
        roi_size: as a strategy takes it; 0, less than 0 or None stand for the image's size.
        per_axis: places to look at along each axis.
        padding_value: fills up an image that is smaller than the window, on both sides.
    """
    image = image_BC.as_tensor() if hasattr(image_BC, "as_tensor") else image_BC
    size = image.shape[2:]
    asked = (roi_size,) * len(size) if isinstance(roi_size, int) else tuple(roi_size)
    if len(asked) != len(size):
        raise ValueError(f"roi_size {asked} is for {len(asked)} spatial axes, but the image has {len(size)}")
    roi = [length if r is None or r <= 0 else r for r, length in zip(asked, size, strict=True)]
    starts = [
        sorted({max(length - r, 0) * n // max(per_axis - 1, 1) for n in range(per_axis)})
        for r, length in zip(roi, size, strict=True)
    ]
    places = [
        tuple(slice(first, first + r) for first, r in zip(corner, roi, strict=True)) for corner in product(*starts)
    ]
    found = [(b, (slice(None), *place)) for b in range(len(image)) for place in places]
    b, place = max(found, key=lambda where: _variation(image[where[0]][where[1]]))
    window = image[b][place][None]
    missing = [r - length for r, length in zip(roi, window.shape[2:], strict=True)]
    return F.pad(window, [n for m in missing[::-1] for n in (m // 2, m - m // 2)], value=padding_value).clone()


def _variation(window_C: torch.Tensor) -> float:
    spread = float(window_C.flatten(1).float().std(1, correction=0).mean())
    return spread if spread == spread else -1.0  # not a number


def _labels(logits_K: torch.Tensor) -> torch.Tensor:
    return logits_K.flatten(1)[0] > 0 if len(logits_K) == 1 else largest(logits_K.flatten(1))[0]


def _first_tensor(output: Any) -> torch.Tensor:
    while not isinstance(output, torch.Tensor):
        if not isinstance(output, Mapping | tuple | list) or not output:
            raise ValueError(
                f"precision is judged by a tensor of logits, but the network returns {type(output).__name__}"
            )
        output = next(iter(output.values())) if isinstance(output, Mapping) else output[0]
    return output


def _why_no_bfloat16(device: torch.device) -> str:
    """What the device lacks to be fast in bfloat16; empty if nothing."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            if torch.cuda.is_bf16_supported(including_emulation=False):
                return ""
        return f"{torch.cuda.get_device_name(device)} does not multiply bfloat16"
    if device.type == "cpu":
        if any(hasattr(torch.cpu, name) and getattr(torch.cpu, name)() for name in _CPU_HAS_BFLOAT16):
            return ""
        return "this processor has neither AMX nor AVX512-BF16, as far as PyTorch can tell"
    return f"bfloat16 is not chosen by itself on {device.type}"


def _castable(network: Callable) -> bool:
    return isinstance(network, nn.Module) and not isinstance(network, torch.jit.ScriptModule)


def _has_dtype(network: nn.Module, dtype: torch.dtype) -> bool:
    tensors = (*network.parameters(), *network.buffers())
    return all(tensor.dtype == dtype for tensor in tensors if tensor.is_floating_point())


def _cast(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy with floating point weights and buffers in ``dtype``; it shares all that needs no cast."""
    memo: dict[int, Any] = {}
    for parameter in network.parameters():
        needed = parameter.is_floating_point() and parameter.dtype != dtype
        memo[id(parameter)] = nn.Parameter(parameter.detach().to(dtype), requires_grad=False) if needed else parameter
    for buffer in network.buffers():
        memo[id(buffer)] = buffer.to(dtype) if buffer.is_floating_point() else buffer
    return copy.deepcopy(network, memo)

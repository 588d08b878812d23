"""Where short cuts may be taken, and tensors that follow from parameters and are worth keeping between two passes
without gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch._C._functorch import peek_interpreter_stack
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import _get_current_dispatch_mode

_PLAIN: ContextVar[bool] = ContextVar("plain_pytorch", default=False)
_ADVICE = "run the network, and what differentiates it, within medseg3d.networks.plain_pytorch()"


@contextmanager
def plain_pytorch() -> Iterator[None]:
    """Within it, networks run on operations of PyTorch alone, which can be differentiated twice and forward.

    Their own kernels and gradients are faster, and give the same but for rounding.
    """
    before = _PLAIN.set(True)
    try:
        yield
    finally:
        _PLAIN.reset(before)


def wants_plain() -> bool:
    """Whether ``plain_pytorch`` is in force."""
    return not torch.compiler.is_compiling() and _PLAIN.get()


class OwnGradient(torch.autograd.Function):
    """A function whose gradient is written by hand, and which has no other derivative."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(f"short cuts of this network have no forward-mode derivative: {_ADVICE}")


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """PyTorch's, with an error that says what to do, and also where no gradient came in that has one itself."""

    @wraps(backward)
    def own(ctx: Any, *grads: Any) -> Any:
        with torch.no_grad():
            outputs = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return outputs
        given = outputs if isinstance(outputs, tuple) else (outputs,)
        message = f"short cuts of this network cannot be differentiated twice: {_ADVICE}"
        later: Any = torch._C._functions.DelayedError(message.encode(), len(given))
        failing = later(*(None if grad is None else grad.detach().requires_grad_() for grad in given))
        return failing if isinstance(outputs, tuple) else failing[0]

    return own


def is_plain_eager() -> bool:
    """Whether short cuts may be taken: the operations just run, and ``plain_pytorch`` is not in force."""
    return is_eager() and not _PLAIN.get()


def is_eager() -> bool:
    """Whether the operations just run: nothing compiles, exports, traces, scripts, counts or transforms them."""
    if torch.jit.is_scripting() or torch.jit.is_tracing() or torch.compiler.is_compiling():
        return False
    # Transforms are those of torch.func, which our autograd functions do not know.
    return _get_current_dispatch_mode() is None and peek_interpreter_stack() is None


def is_symbolic(x: torch.Tensor) -> bool:
    """Whether a tracer, a compiler or an exporter runs, which takes no check of sizes."""
    return isinstance(x, torch.fx.Proxy) or torch.jit.is_tracing() or torch.compiler.is_compiling()


def check_axes(x: torch.Tensor, spatial_dims: int, first: nn.Module, network: str) -> None:
    """ValueError unless ``x`` is (batch, channels, *spatial axes), as many channels as the ``first`` part takes."""
    if x.dim() != spatial_dims + 2:
        raise ValueError(f"{network} takes {spatial_dims} spatial axes, got a shape of {tuple(x.shape[2:])}")
    # Parts may have been replaced.
    channels = next((part.in_channels for part in first.modules() if hasattr(part, "in_channels")), x.shape[1])
    if x.shape[1] != channels:
        raise ValueError(f"{network} takes images (batch, {channels}, ...), {channels} channels, got {tuple(x.shape)}")


def is_hooked(*modules: nn.Module) -> bool:
    """Whether a hook looks at one of the modules or a part of it: each must be called then, and what it gave must stay.

    Pruning and spectral norm compute a layer's weight in such a hook.
    """
    return _has_any_global_hook() or any(
        part._forward_pre_hooks or part._forward_hooks or part._backward_hooks or part._backward_pre_hooks
        for module in modules
        for part in module.modules()
    )


def must_be_called(module: nn.Module) -> bool:
    """Whether a hook waits for a call of the module or a part of it. One that counts what runs does not mind."""
    return not torch.compiler.is_compiling() and _get_current_dispatch_mode() is None and is_hooked(module)


def _state(source: torch.Tensor) -> tuple[Any, ...]:
    version = None if source.is_inference() else source._version
    return source.data_ptr(), version, source.dtype, source.device, source.shape, source.stride(), _sum_of_bits(source)


def _sum_of_bits(source: torch.Tensor) -> int:
    """All values, read as whole numbers and added up modulo 2^64: any change of one value changes it.

    Eight bytes at a time, which is as fast as memory. Changes that cancel go unseen, as of values that swap places.
    """
    in_memory = source.detach().permute(sorted(range(source.dim()), key=source.stride, reverse=True))
    rows = in_memory.unsqueeze(-1).flatten(1)
    layout = rows.shape[1], rows.stride(0), rows.storage_offset()
    for number in (torch.int64, torch.int32, torch.int16, torch.int8):
        values = number.itemsize // rows.element_size()
        if values == 1 or (values > 1 and rows.stride(1) == 1 and not any(n % values for n in layout)):
            return int(rows.view(number).sum())
    raise AssertionError(f"parameters of {source.dtype} are not looked at")


class Derived:
    """A tensor computed from parameters, kept until one of them changes.

    Nothing is kept while gradients are recorded or a compiler looks on, nor off the CPU, where looking at the values
    would mean to wait for them, nor copied or pickled with the module.
    """

    def __init__(self) -> None:
        self._key: Any = None
        self._sources: tuple[torch.Tensor, ...] = ()
        self._value: Any = None

    def __call__(self, compute: Callable[..., Any], *sources: torch.Tensor, also: Any = None) -> Any:
        """``compute(*sources)``, or what it gave for the same sources; ``also`` is what else it depends on."""
        on_cpu = all(source.device.type == "cpu" for source in sources)
        if not on_cpu or torch.is_grad_enabled() or not is_plain_eager():
            return compute(*sources)
        # Versions alone would miss changes through ``.data``, and inference tensors, which have none.
        key = (also, tuple(_state(source) for source in sources))
        if key != self._key:
            # The sources are held so that their addresses cannot pass to other tensors.
            self._value, self._sources, self._key = compute(*sources), tuple(s.detach() for s in sources), key
        return self._value

    def __deepcopy__(self, memo: dict[int, Any]) -> Derived:
        return Derived()

    def __reduce__(self) -> tuple[type[Derived], tuple[()]]:
        return Derived, ()

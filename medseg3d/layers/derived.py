"""Tensors that follow from parameters and are worth keeping between two passes without gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode


def is_plain_eager() -> bool:
    """Whether the operations just run: nothing compiles, exports, traces, scripts or counts them."""
    if torch.jit.is_scripting() or torch.jit.is_tracing() or torch.compiler.is_compiling():
        return False
    return _get_current_dispatch_mode() is None


def _state(source: torch.Tensor) -> tuple[Any, ...]:
    version = None if source.is_inference() else source._version
    return source.data_ptr(), version, source.dtype, source.device, source.shape


class Derived:
    """A tensor computed from parameters, kept until one of them changes.

    Nothing is kept while gradients are recorded or a compiler looks on, nor copied or pickled with the module. What is
    changed through ``.data`` of a parameter, without its version counter, goes unseen.
    """

    def __init__(self) -> None:
        self._key: Any = None
        self._sources: tuple[torch.Tensor, ...] = ()
        self._value: Any = None

    def __call__(self, compute: Callable[..., Any], *sources: torch.Tensor, also: Any = None) -> Any:
        """``compute(*sources)``, or what it gave for the same sources; ``also`` is what else it depends on."""
        if torch.is_grad_enabled() or not is_plain_eager():
            return compute(*sources)
        key = (also, tuple(_state(source) for source in sources))
        if key != self._key:
            # The sources are held so that their addresses cannot pass to other tensors.
            self._value, self._sources, self._key = compute(*sources), tuple(s.detach() for s in sources), key
        return self._value

    def __deepcopy__(self, memo: dict[int, Any]) -> Derived:
        return Derived()

    def __reduce__(self) -> tuple[type[Derived], tuple[()]]:
        return Derived, ()

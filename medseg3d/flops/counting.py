"""Operations of any network at any size of input, counted as it runs on tensors that have a shape and no values.

No weights and no voxels exist then (PyTorch's "meta" device), so that the largest network takes a second and hardly any
memory. What is counted is the network as its paper has it: medseg3d's own faster ways to compute the same, such as
Winograd's, stand back where operations are watched.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
# The operand of each product whose last axis is summed over.
_PRODUCTS = {
    **dict.fromkeys((_aten.mm, _aten.bmm, _aten.mv, _aten.dot, _aten.vdot), 0),
    **dict.fromkeys((_aten.addmm, _aten.baddbmm, _aten.addbmm, _aten.addmv), 1),
}
_FUSED_ATTENTION = "_scaled_dot_product_"


@dataclass(frozen=True)
class Operation:
    """A convolution or product that ran.

    Attributes:
        module: path of the innermost module that it ran in; empty for the network itself.
        name: "convolution", "mm", ...
        macs: multiply-adds.
        values: numbers that it gave.
    """

    module: str
    name: str
    macs: int
    values: int

    @property
    def flops(self) -> int:
        return 2 * self.macs


@dataclass(frozen=True)
class ModuleCount:
    """What a part of a network amounts to.

    Attributes:
        name: path of the module; empty for what the network does outside of its children.
        kind: name of its class.
        parameters: numbers that may be learned.
        macs: multiply-adds.
        activations: numbers that its convolutions and products gave.
    """

    name: str
    kind: str
    parameters: int
    macs: int
    activations: int

    @property
    def flops(self) -> int:
        return 2 * self.macs


@dataclass(frozen=True)
class Count:
    """What a network takes for one input.

    Attributes:
        input_shape: (B, C, *spatial).
        operations: all that counted, in the order in which they ran.
        modules: path -> (name of the class, own parameters), parents first.
        on_meta: False if the network's work depends on what it sees, so that it had to run.
    """

    input_shape: tuple[int, ...]
    operations: tuple[Operation, ...]
    modules: dict[str, tuple[str, int]]
    on_meta: bool = True

    @property
    def macs(self) -> int:
        """Multiply-adds."""
        return sum(operation.macs for operation in self.operations)

    @property
    def flops(self) -> int:
        """Floating-point operations: two for each multiply-add."""
        return 2 * self.macs

    @property
    def parameters(self) -> int:
        """Numbers that may be learned, those that are never used among them."""
        return sum(own for _, own in self.modules.values())

    @property
    def activations(self) -> int:
        """Numbers that convolutions and products gave, which memory grows with.

        Dollár et al., "Fast and accurate model scaling", CVPR 2021, section 3.1.
        """
        return sum(operation.values for operation in self.operations)

    @property
    def by_operation(self) -> dict[str, int]:
        """Name of the operation -> FLOPs."""
        found: Counter[str] = Counter()
        for operation in self.operations:
            found[operation.name] += operation.flops
        return dict(found)

    def by_module(self, depth: int = 1) -> list[ModuleCount]:
        """The parts of the network, ``depth`` levels down, in the order in which it has them; they sum up to all.

        What a module does itself, outside of its children, is a row of its own name.
        """
        if depth < 0:
            raise ValueError(f"depth must be 0 or more, got {depth}")
        rows = {name: [0, 0, 0] for name in (_ancestor(path, depth) for path in self.modules)}
        for path, (_, own) in self.modules.items():
            rows[_ancestor(path, depth)][0] += own
        for operation in self.operations:
            row = rows[_ancestor(operation.module, depth)]
            row[1] += operation.macs
            row[2] += operation.values
        return [ModuleCount(name, self.modules[name][0], *row) for name, row in rows.items() if any(row)]


def _ancestor(path: str, depth: int) -> str:
    return ".".join(path.split(".")[:depth])


def count_operations(network: nn.Module, shape: Sequence[int]) -> Count:
    """Operations of a network in evaluation mode; the network is not changed.

    Where what it does depends on the values it sees, as with detectors, a copy runs on a random input on the CPU
    instead, and the numbers are those of that input and the weights as they are.

    Args:
        network: called on one tensor.
        shape: (B, C, *spatial) of its input.

    Raises:
        ValueError: the network does not take that input; the message is the network's own.
    """
    with torch.inference_mode(False), torch.no_grad():
        try:
            return _counted(on_meta(network), torch.empty(tuple(shape), device="meta"))
        except _NeedsValues:
            inputs = torch.rand(tuple(shape), generator=torch.Generator().manual_seed(0))
            return _counted(copy.deepcopy(network).to("cpu"), inputs)


class _NeedsValues(Exception):
    """There is no answer without values."""


def _counted(network: nn.Module, inputs: torch.Tensor) -> Count:
    watch = Watch(network.eval())
    with watch:
        try:
            network(inputs)
        except RuntimeError as error:
            if inputs.is_meta and (isinstance(error, NotImplementedError) or "meta" in str(error)):
                raise _NeedsValues from error  # they say so in many ways, such as item() of a meta tensor
            raise ValueError(
                f"{type(network).__name__} does not take an input of {tuple(inputs.shape)}: {error}"
            ) from error
    return Count(tuple(inputs.shape), tuple(watch.operations), _modules(network), inputs.is_meta)


def _modules(network: nn.Module) -> dict[str, tuple[str, int]]:
    """Path -> (class, own parameters); what two modules share belongs to the first."""
    seen: set[int] = set()
    found = {}
    for path, module in network.named_modules():
        own = {id(p): p.numel() for p in module.parameters(recurse=False) if id(p) not in seen}
        seen |= own.keys()
        found[path] = type(module).__name__, sum(own.values())
    return found


def on_meta(network: nn.Module) -> nn.Module:
    """A copy without values: the memory of none of its weights is taken."""
    memo: dict[int, Any] = {}
    for tensor in chain(network.parameters(), network.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(network, memo)


class Watch(TorchDispatchMode):
    """Notes each convolution and product that runs within it, and in which module of ``network``.

    The network must be one's own: hooks stay in it.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self._path = [""]
        for path, module in network.named_modules():
            module.register_forward_pre_hook(lambda *_, path=path: self._path.append(path))
            module.register_forward_hook(self._leave)

    def _leave(self, *_: Any) -> None:  # what a hook returns would stand in for the module's output
        self._path.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        macs = _macs(func.overloadpacket, args, kwargs or {}, result)
        if macs:
            first = result if isinstance(result, torch.Tensor) else result[0]
            name = func.overloadpacket.__name__
            self.operations.append(Operation(self._path[-1], name, macs, first.numel()))
        return result


def _macs(operation: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Multiply-adds of one operation of PyTorch's; 0 for all that is neither convolution nor product."""
    if operation is _aten.convolution:
        x, weight, transposed = args[0], args[1], args[6]
        positions = (x if transposed else result).shape[2:]
        return len(x) * prod(positions) * weight.numel()
    if operation in _PRODUCTS:
        operand = args[_PRODUCTS[operation]]
        batches = len(operand) if operation is _aten.addbmm else 1  # it sums over the batch too
        return result.numel() * operand.shape[-1] * batches
    if operation.__name__.startswith(_FUSED_ATTENTION) and "backward" not in operation.__name__:
        q_BHND, k_BHND, v_BHND = args[:3]
        scores = prod(q_BHND.shape[:-1]) * k_BHND.shape[-2]
        return scores * (q_BHND.shape[-1] + v_BHND.shape[-1])
    return 0

"""Muon: gradient steps made orthogonal, which train convolutions and attention in a fraction of AdamW's steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from medseg3d.training.checkpoint import unwrapped

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # of Jordan et al.; takes singular values to about 0.7 to 1.2 in five steps
_ROUNDS = 5
_STEP_RMS = 0.2  # what an entry moves by, in learning rates: AdamW's own (Liu et al., section 2.2)


class Muon(Optimizer):
    """Momentum whose step is the nearest orthogonal matrix, for the weights of linear layers and convolutions.

    A layer's gradient is dominated by few directions; with singular values all near 1, the step moves the others as
    far (Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024). A convolution's weight is the
    matrix of one row per first axis. Steps are scaled to AdamW's size (Liu et al., "Muon is scalable for LLM training",
    arXiv 2502.16982, equation 4). All other parameters (norms, biases, embeddings, depth-wise convolutions) are moved
    by Adam, at the same rate.

    Args:
        network: its parameters that want a gradient are trained; with or without ``DistributedDataParallel``.
        lr: learning rate; 0.005 to 0.01 suits networks from random weights here.
        weight_decay: times ``lr``: what each step takes off the weights of layers, as in AdamW; others keep theirs.
        momentum: share of the old momentum that a step keeps, 0 or more and below 1; the step looks ahead (Nesterov).
        betas: of Adam.
        eps: of Adam.

    Raises:
        ValueError: a rate, decay or momentum out of its range; a network with nothing to train.
    """

    def __init__(
        self,
        network: nn.Module,
        lr: float = 0.006,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        betas: Sequence[float] = (0.9, 0.99),
        eps: float = 1e-8,
    ) -> None:
        if lr < 0 or weight_decay < 0:
            raise ValueError(f"lr and weight_decay must be 0 or more, got {lr} and {weight_decay}")
        if not all(0 <= value < 1 for value in (momentum, *betas)):
            raise ValueError(f"momentum and betas must be 0 or more and below 1, got {momentum} and {tuple(betas)}")
        matrices, others = split(unwrapped(network))
        groups = [{"params": matrices, "orthogonal": True}, {"params": others, "orthogonal": False}]
        groups = [group for group in groups if group["params"]]
        if not groups:
            raise ValueError("no parameter of the network wants a gradient: there is nothing to train")
        super().__init__(
            groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": tuple(betas), "eps": eps}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step along the gradients; the closure, if any, is called first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            move = self._orthogonal if group["orthogonal"] else self._adam
            for parameter in group["params"]:
                if parameter.grad is not None:
                    move(parameter, parameter.grad, group)
        return loss

    def _orthogonal(self, parameter: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].lerp_(gradient, 1 - group["momentum"])
        step = orthogonalised(gradient.lerp(momentum, group["momentum"]).flatten(1))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.sub_(step.view(parameter.shape), alpha=group["lr"] * _STEP_RMS * max(step.shape) ** 0.5)

    def _adam(self, parameter: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(step=0, mean=torch.zeros_like(parameter), square=torch.zeros_like(parameter))
        state["step"] += 1
        first, second = group["betas"]
        mean = state["mean"].lerp_(gradient, 1 - first) / (1 - first ** state["step"])
        square = state["square"].lerp_(gradient.square(), 1 - second) / (1 - second ** state["step"])
        parameter.addcdiv_(mean, square.sqrt_().add_(group["eps"]), value=-group["lr"])


def orthogonalised(matrix: torch.Tensor) -> torch.Tensor:
    """About U V^T of a matrix U S V^T, in float32: singular values between 0.6 and 1.3, very small ones less.

    Newton-Schulz of the fifth order, in the products of the shorter side with itself: for a convolution's long rows a
    fraction of the operations of the iteration on the matrix.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    rows = matrix.float().T if tall else matrix.float()
    rows = rows / rows.norm().clamp(min=1e-12)
    products = rows @ rows.T
    unit = torch.eye(len(products), device=products.device)
    factor = unit
    a, b, c = _NEWTON_SCHULZ
    for _ in range(_ROUNDS):
        polynomial = a * unit + b * products + c * products @ products
        factor = polynomial @ factor
        products = polynomial @ products @ polynomial
    result = factor @ rows
    return result.T if tall else result


def split(network: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Weights of linear layers and of convolutions that mix channels; all other parameters. Without frozen ones."""
    layers = (nn.Linear, nn.modules.conv._ConvNd)
    chosen = {
        id(module.weight)
        for module in network.modules()
        if isinstance(module, layers) and getattr(module, "groups", 1) == 1 and min(module.weight.flatten(1).shape) > 1
    }
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return [one for one in trained if id(one) in chosen], [one for one in trained if id(one) not in chosen]

"""The mean of several networks' answers for one window.

Shape legend: logits_BK... are (batch, classes, *spatial axes).
"""

from __future__ import annotations

from typing import Any

import torch

AVERAGES = ("logits", "probabilities")


def check_average(average: str) -> str:
    """``average`` if it is one of ``AVERAGES``; ValueError otherwise."""
    if average not in AVERAGES:
        raise ValueError(f"average must be one of {', '.join(AVERAGES)}, got {average!r}")
    return average


def check_logits(output: Any) -> torch.Tensor:
    """What a network returned, if it is one tensor of floating point numbers; ValueError otherwise."""
    if isinstance(output, torch.Tensor) and output.is_floating_point():
        return output
    kind = str(output.dtype) if isinstance(output, torch.Tensor) else type(output).__name__
    raise ValueError(
        f"a mean is of logits in one floating point tensor, but the network returns {kind}: wrap it so that it returns "
        "the logits only"
    )


class Mean:
    """Weighted mean of logits, or of the probabilities (softmax) that they stand for, as logits of their own type.

    "probabilities" gives the logarithm of the mean probability, whose softmax is the mean probability: whatever takes
    logits takes it. Probabilities are held at the smallest normal float32 or above (1e-38), so that it is finite.
    Beside the logits that are added it holds one float32 tensor of their size, and for probabilities a second.

    Args:
        average: "logits" or "probabilities".
    """

    def __init__(self, average: str) -> None:
        self.average = check_average(average)
        self._sum: torch.Tensor | None = None
        self._weight = 0.0
        self._dtype = torch.float32

    def add(self, logits_BK: torch.Tensor, weight: float = 1.0, channels: torch.Tensor | None = None) -> None:
        """Count in logits (B, K, *spatial).

        Args:
            logits_BK: what a network returned; it is not changed.
            weight: above 0.
            channels: (K,) int64 where the logits are: class k of the mean is the channel of that number; a permutation
                that is its own inverse.

        Raises:
            ValueError: they are no tensor, of another shape than those before, or have no probabilities.
        """
        values = self._values(logits_BK)
        if self._sum is None:
            self._dtype = logits_BK.dtype
            self._sum = torch.zeros_like(values, dtype=torch.promote_types(torch.float32, self._dtype))
        elif self._sum.shape != values.shape:
            raise ValueError(
                f"only logits of one shape have a mean, got {tuple(values.shape)} after {tuple(self._sum.shape)}: "
                "every network must give the same classes at the same resolution"
            )
        if channels is None:
            self._sum.add_(values, alpha=weight)
        else:
            self._sum.index_add_(1, channels, values.to(self._sum.dtype), alpha=weight)
        self._weight += weight

    def result(self) -> torch.Tensor:
        """The mean (B, K, *spatial); call it once, after the last ``add``."""
        assert self._sum is not None, "no logits were added"
        mean = self._sum.div_(self._weight)
        if self.average == "probabilities":
            mean = mean.clamp_(min=torch.finfo(torch.float32).tiny).log_()
        return mean.to(self._dtype)

    def _values(self, logits_BK: torch.Tensor) -> torch.Tensor:
        check_logits(logits_BK)
        if self.average == "logits":
            return logits_BK
        if logits_BK.shape[1] < 2:
            raise ValueError(
                "average='probabilities' takes the softmax over two classes or more, but the network gives one "
                "channel: take average='logits'"
            )
        return logits_BK.softmax(1, dtype=torch.promote_types(torch.float32, logits_BK.dtype))

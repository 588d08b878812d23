"""How sure a network is of each voxel, made slab by slab: memory grows neither with classes nor with the scan's length.

Shape legend: K classes, V voxels, ... spatial axes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from math import log, prod

import numpy as np
import torch

from medseg3d.inference.grid_map import AxisMap
from medseg3d.inference.onto_grid import values_onto
from medseg3d.inference.slabs import Slab, label_dtype, largest
from medseg3d.inference.strategy import Strategy, like, plain


def probabilities(slab: Slab, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """(K, ...) softmax of a slab's logits; torch.float16 halves the memory at an error of up to 2**-12."""
    result = torch.empty((slab.classes, *_voxels(slab)), dtype=dtype, device=slab.values.device)
    for part, logits_KV in slab.blocks():
        result[:, part] = logits_KV.softmax(0)
    return result.view(-1, *slab.values.shape[1:])


def entropy(slab: Slab, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """(...) normalised entropy: 0 where the network is sure, 1 where all classes are alike.

    H = -sum_k p_k log(p_k) / log(K) with the softmax p of the logits (Shannon, "A mathematical theory of
    communication", 1948, section 6).

    Raises:
        ValueError: there is one class only.
    """
    return _of_slab(slab, entropy_of, dtype)


def margin(slab: Slab, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """(...) probability of the best class minus that of the second best: 1 where the network is sure, 0 in a draw.

    Settles, "Active learning literature survey", 2009, section 3.1, after Scheffer et al., IDA 2001.

    Raises:
        ValueError: there is one class only.
    """
    return _of_slab(slab, margin_of, dtype)


@torch.no_grad()
def label_map_with_uncertainty(
    strategy: Strategy,
    inputs: torch.Tensor,
    network: Callable,
    kind: str = "entropy",
    dtype: torch.dtype = torch.float16,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels as :meth:`Strategy.label_map` gives them, and a map of how sure they are, in one pass over the slabs.

    Args:
        strategy: what brings network and image together.
        inputs: (B, C, *spatial); a MetaTensor gives two.
        network: as the strategy takes it.
        kind: "entropy", high where the network is unsure, or "margin", low there; see :func:`entropy`, :func:`margin`.
        dtype: of the map; torch.float16 has an error of up to 2**-12.

    Returns:
        Class numbers (B, 1, *spatial), uint8 (int32 above 256 classes), and the map (B, 1, *spatial), in [0, 1].

    Raises:
        ValueError: ``kind`` is unknown, there is one class only, or a logit is not a number.
    """
    check_kind(kind)
    images = plain(inputs)
    shape = (len(images), 1, *images.shape[2:])
    labels = uncertainty = torch.empty(0)
    for number in range(len(images)):
        for slab in strategy.slabs(images[number : number + 1], network):
            if labels.shape != shape:
                device = slab.values.device
                labels = torch.empty(shape, dtype=label_dtype(slab.classes), device=device)
                uncertainty = torch.empty(shape, dtype=dtype, device=device)
            of_slab = _both(slab, KINDS[kind], dtype)
            labels[number, 0][slab.place], uncertainty[number, 0][slab.place] = of_slab
    return like(labels, inputs), like(uncertainty, inputs)


class Watch:
    """How sure a network is, noted while its slabs go by to whoever makes labels of them: it runs once for both.

    A float16 number is kept for each voxel of the network's grid.

    Args:
        kind: "entropy" or "margin", see :func:`entropy`, :func:`margin`.

    Raises:
        ValueError: ``kind`` is unknown.
    """

    def __init__(self, kind: str) -> None:
        self.kind = check_kind(kind)
        self._slabs: list[Slab] = []

    def each(self, slabs: Iterable[Slab]) -> Iterator[Slab]:
        """The slabs as they are.

        Raises:
            ValueError: they are of one class only.
        """
        for slab in slabs:
            noted = _of_slab(slab, KINDS[self.kind], torch.float16)
            # Outside the network's grid nothing was found for sure: 0 there must stand for that.
            self._slabs.append(Slab(slab.axis, slab.start, (1 - noted if self.kind == "margin" else noted)[None]))
            yield slab

    def onto(self, maps: Sequence[AxisMap]) -> np.ndarray:
        """What was noted on another grid, as ``maps`` draw on the network's: float32 in [0, 1], in steps of 2**-12.

        Outside the network's grid it is that of a network that is sure. Call it after the last slab.
        """
        values = values_onto(self._slabs, maps)
        if self.kind == "margin":
            np.subtract(1, values, out=values)
        # Finer digits are noise of float16, and half of a compressed file.
        values *= 2**12
        np.rint(values, out=values)
        values /= 2**12
        return values.clip(0, 1, out=values)


def check_kind(kind: str) -> str:
    """``kind`` if it is one of ``KINDS``; ValueError otherwise."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    return kind


def entropy_of(logits_KV: torch.Tensor) -> torch.Tensor:
    """(V,) see :func:`entropy`."""
    shares_KV = torch.special.entr(logits_KV.softmax(0))  # 0 where p is 0
    return shares_KV.sum(0).div_(log(len(logits_KV))).clamp_(0, 1)


def margin_of(logits_KV: torch.Tensor) -> torch.Tensor:
    """(V,) see :func:`margin`."""
    best = logits_KV[0]
    second = torch.full_like(best, -torch.inf)
    for row in logits_KV[1:]:  # many times faster than topk over a leading axis on CPUs
        second = torch.maximum(second, torch.minimum(best, row))
        best = torch.maximum(best, row)
    return -torch.expm1(second - best) / (logits_KV - best).exp_().sum(0)


KINDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"entropy": entropy_of, "margin": margin_of}


def _voxels(slab: Slab) -> tuple[int]:
    return (prod(slab.values.shape[1:]),)


def _of_slab(slab: Slab, of: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    _require_classes(slab)
    result = torch.empty(_voxels(slab), dtype=dtype, device=slab.values.device)
    for part, logits_KV in slab.blocks():
        result[part] = of(logits_KV)
    return result.view(slab.values.shape[1:])


def _both(
    slab: Slab, of: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels and uncertainty (...) of a slab, whose logits are made once."""
    _require_classes(slab)
    device = slab.values.device
    labels = torch.empty(_voxels(slab), dtype=label_dtype(slab.classes), device=device)
    uncertainty = torch.empty(_voxels(slab), dtype=dtype, device=device)
    for part, logits_KV in slab.blocks():
        labels[part] = largest(logits_KV)[0]
        uncertainty[part] = of(logits_KV)
    return labels.view(slab.values.shape[1:]), uncertainty.view(slab.values.shape[1:])


def _require_classes(slab: Slab) -> None:
    if slab.classes < 2:
        raise ValueError("uncertainty compares classes, but the network gives one channel: it needs two or more")

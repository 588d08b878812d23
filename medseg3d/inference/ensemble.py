"""Several networks as one: the mean of those with the same classes, and one label map of those with different ones.

Shape legend: window_BC... are (batch, channels, *spatial axes), logits_BK... are (batch, classes, *spatial axes).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from medseg3d.inference.averaging import Mean, check_average
from medseg3d.inference.heads import joined, split_head
from medseg3d.inference.slabs import Head
from medseg3d.io.labels import Color, LabelTable, default_color


class Ensemble(nn.Module):
    """Networks that give the same classes, as one network that answers with their mean; usable in any strategy.

    Networks run one after the other on each window, so memory does not grow with the image: beside what one of them
    needs, two tensors of a window's logits (three for probabilities, and in float32).

    Where each network ends in a convolution of kernel 1 and these take fewer channels in all than there are classes, a
    strategy that applies it after blending still does. The mean of logits is the same then; a mean of probabilities is
    then that of each network's blended logits.

    Args:
        networks: each called as ``network(window_BC, ...)``; returns logits (B, K, *spatial).
        weights: how much each counts, above 0; equally by default.
        average: "probabilities", as in Lakshminarayanan et al., NeurIPS 2017, section 2.4, where a network that is
            surer than the others has no more than its share, or "logits", as in nnU-Net; see
            :class:`medseg3d.inference.averaging.Mean`.

    Raises:
        ValueError: there is no network, or weights do not fit; when called, if networks differ in classes.
    """

    def __init__(
        self, networks: Sequence[Callable], weights: Sequence[float] | None = None, average: str = "probabilities"
    ) -> None:
        super().__init__()
        self.networks = tuple(networks)
        self.members = nn.ModuleList(network for network in self.networks if isinstance(network, nn.Module))
        self.training = any(network.training for network in self.members)
        self.weights = (1.0,) * len(self.networks) if weights is None else tuple(float(weight) for weight in weights)
        self.average = check_average(average)
        if not self.networks:
            raise ValueError("an ensemble needs a network or more, got none")
        if len(self.weights) != len(self.networks) or not all(0 < weight < float("inf") for weight in self.weights):
            raise ValueError(
                f"weights must be a number above 0 for each of the {len(self.networks)} networks, got {self.weights}"
            )

    def forward(self, window_BC: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Logits (B, K, *spatial) in the type and on the device of the first network's own."""
        mean = Mean(self.average)
        for network, weight in zip(self.networks, self.weights, strict=True):
            mean.add(network(window_BC.clone(), *args, **kwargs), weight)  # one may write into its input
        return mean.result()

    def each(self, change: Callable[[Callable], Callable]) -> Ensemble:
        """The same mean of what ``change`` makes of each network."""
        return Ensemble([change(network) for network in self.networks], self.weights, self.average)

    def without_head(self, window_BC: torch.Tensor) -> tuple[Callable, Head] | None:
        """See :mod:`medseg3d.inference.heads`."""
        bodies: list[Callable] = []
        heads: list[Head] = []
        head: Head | None = None
        for network in self.networks:
            split = split_head(network, window_BC)
            if split is None:
                return None
            bodies.append(split[0])
            heads.append(split[1])
            head = joined(heads, self.weights[: len(heads)], self.average)
            if head is None:
                return None

        def features(window_BC: torch.Tensor) -> torch.Tensor:
            return torch.cat([body(window_BC.clone()) for body in bodies], 1)

        return None if head is None else (features, head)


def merge_label_maps(
    label_maps: Sequence[np.ndarray], tables: Sequence[LabelTable], unite: bool = False
) -> tuple[np.ndarray, LabelTable]:
    """One label map and one table of several of the same scan.

    The order is the priority: where two maps name a voxel, the earlier one has it; a background (0) never covers a
    label. A label keeps its number unless an earlier table has it; then it gets the next one above all that are in use.
    Slices along the first axis are merged one by one: beside the result, memory is that of one slice.

    Args:
        label_maps: uint8 or uint16, all of one shape and, for the caller to know, on one grid; they are not changed.
        tables: names and colours of each map's labels.
        unite: labels of the same name become one label, with the earlier one's number and colour.

    Returns:
        The label map, uint8 or above 255 labels uint16, and its table.

    Raises:
        ValueError: maps differ in shape or have another type, a map has a label that its table does not name, or two
            tables have a name in common and ``unite`` is false.
    """
    _check_maps(label_maps, tables)
    numbers, table = _merge_tables(tables, unite)
    dtype = np.uint8 if max(table.names, default=0) <= 255 else np.uint16
    merged = np.zeros(label_maps[0].shape, dtype)
    for position in reversed(range(len(tables))):
        label_map, own = label_maps[position], numbers[position]
        known = np.zeros(65536, bool)
        known[[0, *own]] = True
        new = np.zeros(65536, dtype)
        new[list(own)] = list(own.values())
        for place in np.ndindex(label_map.shape[:1]):
            labels = label_map[place]
            if not known[labels].all():
                unknown = sorted(set(np.unique(labels).tolist()) - {0, *own})
                raise ValueError(f"label map {position} has labels {unknown} that its table does not name: {dict(own)}")
            np.copyto(merged[place], new[labels], where=labels != 0)
    return merged, table


def _check_maps(label_maps: Sequence[np.ndarray], tables: Sequence[LabelTable]) -> None:
    if not label_maps or len(label_maps) != len(tables):
        raise ValueError(f"each label map needs a table, got {len(label_maps)} label maps and {len(tables)} tables")
    for label_map in label_maps:
        if label_map.dtype not in (np.uint8, np.uint16):
            raise ValueError(f"label maps must be uint8 or uint16, got {label_map.dtype}")
        if label_map.shape != label_maps[0].shape:
            raise ValueError(
                f"label maps must lie on one grid, got shapes {label_maps[0].shape} and {label_map.shape}: resample "
                "them onto the scan's grid first"
            )


def _merge_tables(tables: Sequence[LabelTable], unite: bool) -> tuple[list[dict[int, int]], LabelTable]:
    """For each table, its labels' numbers in the merged one; and that."""
    names: dict[int, str] = {}
    label_of: dict[str, int] = {}
    colors: dict[int, Color] = {}
    numbers: list[dict[int, int]] = []
    highest = max((label for table in tables for label in table.names), default=0)
    for position, table in enumerate(tables):
        own: dict[int, int] = {}
        for label, name in table.names.items():
            if name in label_of:
                if not unite:
                    raise ValueError(
                        f"{name!r} is a label of table {position} and a label before it: rename one of them, or unite "
                        "labels of the same name"
                    )
                own[label] = label_of[name]
                continue
            own[label] = label
            if label in names:
                own[label] = highest = highest + 1
            names[own[label]], label_of[name] = name, own[label]
            is_default = table.colors[label] == default_color(label)
            colors[own[label]] = default_color(own[label]) if is_default else table.colors[label]
        numbers.append(own)
    if highest > 65535:
        raise ValueError(f"the label maps have labels up to {highest} in all, but a label map ends at 65535")
    return numbers, LabelTable(names, colors)

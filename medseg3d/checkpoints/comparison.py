"""Which tensor of a file goes where in a network, and what that leaves on either side."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from medseg3d.checkpoints.conversions import (
    BIAS_TABLE,
    FOLDED,
    POSITIONS,
    as_convolutions,
    fold_biases,
    resize_bias_table,
    resize_positions,
)
from medseg3d.checkpoints.names import (
    ENCODERS,
    HEADS,
    Layout,
    place,
    plain_names,
    why_unused_in_file,
    why_unused_in_network,
)
from medseg3d.checkpoints.report import CheckpointReport, Mismatch
from medseg3d.checkpoints.translations import translate

INDEX = "relative_position_index"


@dataclass(frozen=True)
class Alignment:
    """The tensors of a file and of a network by plain name, and which belong together.

    Attributes:
        file, network: plain name -> tensor.
        file_keys, network_keys: plain name -> the name that it has there.
        layout: the layout of the file that was recognised.
        placed: plain name in the network -> plain name in the file.
        folded: plain names in the file whose values were taken into other tensors.
    """

    file: dict[str, torch.Tensor]
    network: dict[str, torch.Tensor]
    file_keys: dict[str, str]
    network_keys: dict[str, str]
    layout: Layout
    placed: dict[str, str]
    folded: Collection[str]

    def why_left_over(self, name: str) -> str:
        return FOLDED if name in self.folded else why_unused_in_file(name, self.layout, self.file)


def align(tensors: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> Alignment:
    """Find the layout of a file, for the state of a network, and fold what the network keeps elsewhere."""
    file_keys, network_keys = plain_names(tensors), plain_names(state)
    translated = translate(file_keys, network_keys)
    file_keys = {translated.get(name, name): key for name, key in file_keys.items()}
    file = {name: tensors[key] for name, key in file_keys.items()}
    network = {name: state[key] for name, key in network_keys.items()}
    layout, placed = place(file, network)
    means, folded = fold_biases(file, placed)
    file |= as_convolutions(file, network, placed)
    return Alignment(file | means, network, file_keys, network_keys, layout, placed, folded)


def resize_all_positions(alignment: Alignment, network: nn.Module, file_grid: Sequence[int] | None) -> list[str]:
    """Bring position tables of the file to the grids of the network; a note for each one."""
    notes = []
    for target, name in alignment.placed.items():
        table, own = alignment.file[name], alignment.network[target]
        if target.endswith(POSITIONS) and (file_grid is not None or table.shape != own.shape):
            key = alignment.network_keys[target]
            alignment.file[name] = resize_positions(table, key, network, file_grid)
            if alignment.file[name] is not table:
                notes.append(f"{key} was interpolated from {table.shape[1]} to {own.shape[1]} positions")
        elif target.endswith(BIAS_TABLE) and table.shape != own.shape:
            key = alignment.network_keys[target]
            alignment.file[name] = resize_bias_table(table, key, network)
            if alignment.file[name] is not table:
                notes.append(f"{key} was interpolated from {table.shape[0]} to {own.shape[0]} offsets")
    return notes


def compare(
    alignment: Alignment, report: CheckpointReport, scope: str | None, skip: Collection[str]
) -> dict[str, torch.Tensor]:
    """Fill the report's lists and shares; what to load, by the network's keys.

    Raises:
        ValueError: `scope` or an entry of `skip` is the beginning of no key of the network.
    """
    for beginning in (*([scope] if scope else []), *skip):
        if not any(_begins(alignment, target, [beginning]) for target in alignment.network):
            parts = ", ".join(sorted({key.partition(".")[0] + "." for key in alignment.network_keys.values()}))
            raise ValueError(f"no key of {report.network} begins with {beginning!r}; its keys begin with {parts}")
    report.scope = scope if scope is not None else _encoder(alignment)
    outside = {t for t in alignment.network if report.scope and not _begins(alignment, t, [report.scope])}
    skip = [*skip, *_new_heads(alignment, report)]
    skipped = {t for t in alignment.network if _begins(alignment, t, skip)} - outside
    report.skipped = [alignment.network_keys[target] for target in skipped]
    values: dict[str, torch.Tensor] = {}
    for target, name in alignment.placed.items():
        reason = f"outside {report.scope}*" if target in outside else "skipped as asked" if target in skipped else ""
        if reason:
            report.left_over[alignment.file_keys[name]] = reason
        elif target.endswith(INDEX):
            _compare_index(alignment, report, target)
        else:
            _compare_one(alignment, report, target, values)
    for target in alignment.network.keys() - alignment.placed.keys() - outside - skipped:
        report.missing[alignment.network_keys[target]] = why_unused_in_network(target)
    for name in alignment.file.keys() - set(alignment.placed.values()):
        report.left_over[alignment.file_keys[name]] = alignment.why_left_over(name)
    _in_order(alignment, report)
    _measure(alignment, report, outside | skipped, values)
    return values


def _begins(alignment: Alignment, target: str, beginnings: Collection[str]) -> bool:
    """Whether a plain name of the network, or its key, begins with one of these."""
    return target.startswith(tuple(beginnings)) or alignment.network_keys[target].startswith(tuple(beginnings))


def _encoder(alignment: Alignment) -> str:
    """The encoder that a file is for, if it names nothing else of the network and the network has more."""
    for encoder in ENCODERS:
        outside = any(not target.startswith(encoder) for target in alignment.network)
        if outside and alignment.placed and all(target.startswith(encoder) for target in alignment.placed):
            return encoder
    return ""


def _new_heads(alignment: Alignment, report: CheckpointReport) -> list[str]:
    """Heads of which the file, that of a classifier, has no layer at all."""
    heads = [head for head in HEADS if any(target.startswith(head) for target in alignment.network)]
    new = [head for head in heads if not any(name.startswith(head) for name in alignment.file)]
    report.notes += [f"{head}* is not in the file, so it keeps its values: they are to be trained" for head in new]
    return new


def _compare_one(alignment: Alignment, report: CheckpointReport, target: str, values: dict[str, torch.Tensor]) -> None:
    name = alignment.placed[target]
    tensor, key = alignment.file[name], alignment.network_keys[target]
    if tensor.shape != alignment.network[target].shape:
        report.mismatched.append(Mismatch(key, tuple(tensor.shape), tuple(alignment.network[target].shape)))
    else:
        values[key] = tensor
        _match(alignment, report, target)


def _match(alignment: Alignment, report: CheckpointReport, target: str) -> None:
    key, file_key = alignment.network_keys[target], alignment.file_keys[alignment.placed[target]]
    report.matched.append(key)
    if key != file_key:
        report.renamed.append((file_key, key))


def _compare_index(alignment: Alignment, report: CheckpointReport, target: str) -> None:
    """The network keeps its own index table, which follows from its window; the file's must say the same."""
    name = alignment.placed[target]
    stored, own = alignment.file[name], alignment.network[target]
    as_long = stored.numel() == own.numel()  # some keep it in one row, others in as many as a window has tokens
    if as_long and (own.is_meta or stored.is_meta or torch.equal(stored.flatten(), own.flatten().to(stored))):
        _match(alignment, report, target)
        return
    report.left_over[alignment.file_keys[name]] = "the network makes its own from the window size"
    if as_long:
        report.notes.append(
            f"{alignment.file_keys[name]} numbers the positions in a window otherwise than the network does: the "
            "weights may come from another implementation, look at its results before you trust them"
        )


def _in_order(alignment: Alignment, report: CheckpointReport) -> None:
    """Sets have no order; a report has the network's and the file's."""
    network, file = list(alignment.network_keys.values()), list(alignment.file_keys.values())
    report.skipped.sort(key=network.index)
    report.missing = dict(sorted(report.missing.items(), key=lambda item: network.index(item[0])))
    report.left_over = dict(sorted(report.left_over.items(), key=lambda item: file.index(item[0])))


def _values(tensor: torch.Tensor) -> int:
    """How many values of a tensor count: parameters and running statistics do, index tables and counters do not."""
    return tensor.numel() if tensor.is_floating_point() else 0


def _measure(
    alignment: Alignment, report: CheckpointReport, unwanted: Collection[str], values: Mapping[str, torch.Tensor]
) -> None:
    counted = {
        target: _values(own)
        for target, own in alignment.network.items()
        if target in alignment.placed or not why_unused_in_network(target)
    }
    loaded = [target for target, key in alignment.network_keys.items() if key in values]
    got = sum(counted[target] for target in loaded)
    report.share = got / max(1, sum(counted.values()))
    report.scope_share = got / max(1, sum(size for target, size in counted.items() if target not in unwanted))
    harmless = {name for name, key in alignment.file_keys.items() if report.left_over.get(key)}
    offered = sum(_values(tensor) for name, tensor in alignment.file.items() if name not in harmless)
    report.used = sum(_values(alignment.file[alignment.placed[target]]) for target in loaded) / max(1, offered)

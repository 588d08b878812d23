"""Weights of a file into a network: all that fits or nothing, and a report."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import nn

from medseg3d.checkpoints.advice import advise
from medseg3d.checkpoints.comparison import align, compare, resize_all_positions
from medseg3d.checkpoints.files import Source, Weights, read_weights
from medseg3d.checkpoints.merging import order_of, set_order, settle_order
from medseg3d.checkpoints.report import CheckpointMismatch, CheckpointReport, percent
from medseg3d.checkpoints.saving import bare

logger = logging.getLogger(__name__)


def load_checkpoint(
    network: nn.Module,
    source: Source,
    *,
    threshold: float = 1.0,
    scope: str | None = None,
    skip: Sequence[str] = (),
    merging_order: str = "auto",
    monai_version: str | None = None,
    interpolate_positions: bool = False,
    position_grid: Sequence[int] | None = None,
    entry: str | None = None,
) -> CheckpointReport:
    """Load weights of medseg3d, of MONAI 0.6 to 1.6 or of the public pre-training codes into a network.

    All is decided before the first value is written: the network gets what fits, or stays as it was. What counts as a
    fit, and which public file goes where, says docs/checkpoints.md. Values are cast to the network's number formats.

    Args:
        network: a network of medseg3d or of MONAI, on any device, wrapped or not.
        source: a .pt, .pth, .ckpt or .safetensors file, a zip with one of these, either of them open for reading bytes,
            or a state_dict that is loaded.
        threshold: least part of the parameters in the scope that must find their values, and of the file's values
            that must find their place, 0 to 1. What does not fit keeps its values.
        scope: beginning of the network's keys to load, "" for all. By default that of the encoder, "swinViT." or
            "vit.", if the file has nothing else that the network has, and "" otherwise.
        skip: beginnings of the network's keys that keep their values, ("out.",) for a new head.
        merging_order: order of Swin's patch merging in training: "legacy" (MONAI 0.9 to 1.4, all public files),
            "merging" (from 1.5 on) or "mergingv2". By default what the file records or `monai_version` implies; else
            "mergingv2" if the network was built with it, and "legacy" otherwise.
        monai_version: the MONAI release that trained the weights, such as "1.3.2" (a bundle's metadata may name a
            later one).
        interpolate_positions: resize position tables of another length, and in 2D those of Swin's windows, for further
            training.
        position_grid: tokens along each axis in the file's position table, if not a cube (in 2D a square).
        entry: name of the set of tensors to take where the file has several, such as "ema".

    Returns:
        The report. It is logged as a warning unless `report.complete`, and where the order of merging is a guess.

    Raises:
        CheckpointMismatch: a ValueError with the report: too little fits, values are NaN or infinite, or the network
            cannot merge patches in the order that the weights need.
        ValueError: the source is damaged, holds no weights, or objects other than tensors.
        OSError: there is no such file, or it cannot be read.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold is a part of the parameters, from 0 to 1, got {threshold}")
    state, weights = _state(network), read_weights(source, entry)
    alignment = align(weights.tensors, state)
    report = CheckpointReport(weights.source, type(bare(network)).__name__, notes=_notes(weights, network))
    if interpolate_positions:
        report.notes += resize_all_positions(alignment, network, position_grid)
    values = compare(alignment, report, scope, (skip,) if isinstance(skip, str) else skip)
    values = {key: _cast(value, state[key], key, weights.source) for key, value in values.items()}
    report.not_finite = [key for key, value in values.items() if not torch.isfinite(value).all()]
    report.advice = advise(alignment, report)
    _judge(report, threshold)
    try:
        order = settle_order(network, values.keys(), weights.record, merging_order, monai_version)
    except ValueError as error:
        raise CheckpointMismatch(f"{report.source} was not loaded: {error}", report) from error
    network.load_state_dict(values, strict=False)
    if order is not None:
        set_order(network, order.name)
        report.notes.append(f'patch merging order "{order.name}": {order.reason}')
    report.merging_order = order_of(network)
    if not report.complete or (order is not None and order.guessed):
        logger.warning("%s", report)
    return report


def _state(network: nn.Module) -> dict[str, torch.Tensor]:
    state = network.state_dict()
    if any(tensor.is_meta for tensor in state.values()):
        raise ValueError("the network has no memory for its weights (device 'meta'): call network.to_empty(device=...)")
    return state


def _notes(weights: Weights, network: nn.Module) -> list[str]:
    saved, now = weights.record.get("network"), type(bare(network)).__name__
    if saved in (None, now):
        return weights.notes
    return [*weights.notes, f"the file was saved from a {saved}, the network is a {now}"]


def _cast(value: torch.Tensor, own: torch.Tensor, key: str, source: str) -> torch.Tensor:
    if own.is_floating_point() and not value.is_floating_point():
        raise ValueError(
            f"{source} holds {key} as {value.dtype}, where the network needs {own.dtype}: quantised weights are not "
            "converted back here, use the file that they were made from"
        )
    return value.to(own.dtype)


def _judge(report: CheckpointReport, threshold: float) -> None:
    """Raise unless enough fits and every value is a number."""
    enough = report.matched and min(report.scope_share, report.used) >= threshold
    if enough and not report.not_finite:
        return
    part = f"the {report.scope}* of {report.network}" if report.scope else report.network
    message = f"{report.source} was not loaded into {part}, which is as it was: "
    if not enough:
        message += (
            f"{percent(report.scope_share)} of its parameters find their values in the file and "
            f"{percent(report.used)} of the file's values find a place, where at least {percent(threshold)} must. "
        )
    details = [*report.problems(), *report.advice]
    raise CheckpointMismatch(message + ". ".join(text[0].upper() + text[1:] for text in details) + ".", report)

"""What may make a file fit a network, told from what does not fit."""

from __future__ import annotations

from collections.abc import Callable

from medseg3d.checkpoints.comparison import Alignment
from medseg3d.checkpoints.conversions import POSITIONS
from medseg3d.checkpoints.report import CheckpointReport, Mismatch


def advise(alignment: Alignment, report: CheckpointReport) -> list[str]:
    """Advice for each known reason why a file does not fit; empty if it fits or the reason is not known."""
    strange = [key for key, reason in report.left_over.items() if not reason]
    if len(strange) > len(alignment.placed):
        return [
            f"these seem to be weights of another network: it has names such as {', '.join(strange[:3])}, this one "
            f"{', '.join(list(alignment.network)[:3])}"
        ]
    if other := _dimensions(alignment, report):
        return [other]
    found = [advice(alignment, report) for advice in _ADVICE]
    return [text for text in found if text]


def _projection(alignment: Alignment, report: CheckpointReport) -> str | None:
    file = _kind_of_projection(list(alignment.file))
    network = _kind_of_projection(list(alignment.network))
    if file and network and file != network:
        return f'the file has a {file} patch embedding, the network a {network} one: build it with proj_type="{file}"'
    return None


def _kind_of_projection(names: list[str]) -> str | None:
    for kind, end in (("perceptron", "patch_embeddings.1.weight"), ("conv", "patch_embeddings.weight")):
        if any(name.endswith(end) for name in names):
            return kind
    return None


def _dimensions(alignment: Alignment, report: CheckpointReport) -> str | None:
    if odd := _first(report, _of_other_axes):
        file, network = len(odd.file_shape) - 2, len(odd.network_shape) - 2
        return f"the file is of a {file}D network, this one is {network}D (spatial_dims)"
    return None


def _of_other_axes(mismatch: Mismatch) -> bool:
    """Not a matrix, which may be a convolution over all that there is."""
    axes = {len(mismatch.file_shape), len(mismatch.network_shape)}
    return len(axes) > 1 and min(axes) > 2


def _width(alignment: Alignment, report: CheckpointReport) -> str | None:
    odd = _first(report, lambda mismatch: mismatch.key.endswith("patch_embed.proj.weight"))
    if odd is None or len(odd.file_shape) != len(odd.network_shape):
        return None
    (file_size, file_channels), (size, channels) = odd.file_shape[:2], odd.network_shape[:2]
    return (
        f"the file is of a network with feature_size={file_size} and in_channels={file_channels}, this one has "
        f"{size} and {channels}"
    )


def _window(alignment: Alignment, report: CheckpointReport) -> str | None:
    odd = _first(report, lambda mismatch: mismatch.key.endswith("relative_position_bias_table"))
    if odd is None or odd.file_shape[1:] != odd.network_shape[1:]:
        return None
    return (
        f"the file is of a network with {_windows(odd.file_shape[0])}, this one has {_windows(odd.network_shape[0])}: "
        "build it with the file's window_size"
    )


def _windows(rows: int) -> str:
    """The window of a table with (2 w - 1)^n rows."""
    for axes in (3, 2):
        edge = round(rows ** (1 / axes))
        if edge**axes == rows and edge % 2:
            return f"windows of {(edge + 1) // 2} tokens along each of {axes} axes"
    return f"windows of {rows} relative positions"


def _positions(alignment: Alignment, report: CheckpointReport) -> str | None:
    odd = _first(report, lambda mismatch: mismatch.key.endswith(POSITIONS))
    if odd is None or odd.file_shape[2:] != odd.network_shape[2:]:
        return None
    return (
        f"the file's position table is for {odd.file_shape[1]} patches, the network's for {odd.network_shape[1]}: "
        "build it with the file's img_size, or pass interpolate_positions=True and train on"
    )


def _version_2(alignment: Alignment, report: CheckpointReport) -> str | None:
    of_file, of_network = (
        any(name.removeprefix("swinViT.").startswith("layers1c.") for name in names)
        for names in (alignment.file, alignment.network)
    )
    if of_file == of_network or not any(name.endswith("patch_embed.proj.weight") for name in alignment.placed):
        return None
    return f"the file is of version {1 + of_file} of Swin UNETR: build the network with use_v2={of_file}"


def _head(alignment: Alignment, report: CheckpointReport) -> str | None:
    parts = {mismatch.key.rpartition("out.")[0] + "out." for mismatch in report.mismatched if "out." in mismatch.key}
    if len(parts) != 1 or not all(mismatch.key.startswith(tuple(parts)) for mismatch in report.mismatched):
        return None
    (part,) = parts
    return f'the file is for another number of classes: to train a new head pass skip=("{part}",)'


def _scores(alignment: Alignment, report: CheckpointReport) -> str | None:
    scores = ("score_", "upscore")
    if not report.mismatched or not all(mismatch.key.startswith(scores) for mismatch in report.mismatched):
        return None
    return f"the file is for another number of classes: to train new scores pass skip={scores}"


def _detector(alignment: Alignment, report: CheckpointReport) -> str | None:
    heads = ("roi_heads.box_predictor.", "roi_heads.mask_predictor.mask_fcn_logits.")
    if not report.mismatched or not all(mismatch.key.startswith(heads) for mismatch in report.mismatched):
        return None
    return f"the file is for another number of classes: to train new ones pass skip={heads}"


def _first(report: CheckpointReport, wanted: Callable[[Mismatch], bool]) -> Mismatch | None:
    return next(filter(wanted, report.mismatched), None)


_ADVICE = (_projection, _width, _window, _positions, _version_2, _head, _scores, _detector)

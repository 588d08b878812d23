"""What became of every tensor of a file and of a network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


class Mismatch(NamedTuple):
    """A tensor that has another shape in the file than in the network."""

    key: str
    file_shape: tuple[int, ...]
    network_shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.key} is {self.file_shape} in the file and {self.network_shape} in the network"


@dataclass
class CheckpointReport:
    """What became of every tensor of a file and of a network. `str(report)` is a summary by parts of the network.

    Attributes:
        source: the file.
        network: class name of the network.
        scope: the part of the network that the file is for, as the beginning of keys; "" is the whole network.
        matched: keys of the network that take their values from the file.
        renamed: (key in the file, key in the network) of those matched under another name.
        missing: keys of the scope that the file lacks -> why that does no harm, "" if it does.
        left_over: keys of the file that have no place -> why that does no harm, "" if it does.
        mismatched: tensors of another shape.
        skipped: keys of the network that were to be skipped.
        not_finite: keys whose values hold NaN or infinity.
        share: matched part of the network's parameters and running statistics, 0 to 1, counted in values; those
            that never matter are not counted.
        scope_share: the same within the scope and without what was to be skipped.
        used: matched part of the file's values, 0 to 1, without those known as harmless.
        merging_order: order of patch merging that the network has now; None if it merges no patches in 3D.
        notes: what was decided and why.
        advice: what may make the file fit.
    """

    source: str
    network: str
    scope: str = ""
    matched: list[str] = field(default_factory=list)
    renamed: list[tuple[str, str]] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    left_over: dict[str, str] = field(default_factory=dict)
    mismatched: list[Mismatch] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    not_finite: list[str] = field(default_factory=list)
    share: float = 0.0
    scope_share: float = 0.0
    used: float = 0.0
    merging_order: str | None = None
    notes: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether every value of the network that matters comes from the file."""
        return self.share == 1

    def problems(self) -> list[str]:
        """What keeps the file from fitting, a phrase each; empty if it fits."""
        found = []
        if harmful := [key for key, reason in self.missing.items() if not reason]:
            found.append(f"missing in the file: {by_part(harmful)}")
        if harmful := [key for key, reason in self.left_over.items() if not reason]:
            found.append(f"left over in the file: {by_part(harmful)}")
        if self.mismatched:
            shown = "; ".join(map(str, self.mismatched[:3]))
            more = f"; and {len(self.mismatched) - 3} more" if len(self.mismatched) > 3 else ""
            found.append(f"of another shape: {shown}{more}")
        if self.not_finite:
            found.append(f"with NaN, infinity or values beyond the network's number format: {by_part(self.not_finite)}")
        return found

    def __str__(self) -> str:
        part = f"{self.scope}* of {self.network}" if self.scope else self.network
        lines = [
            f"{self.source} -> {part}: {len(self.matched)} tensors, {percent(self.scope_share)} of its parameters; "
            f"{percent(self.used)} of the file is used"
        ]
        if not self.complete:
            lines.append(f"{percent(1 - self.share)} of the network's parameters take no value from the file")
        if self.renamed:
            lines.append("renamed: {}, such as {} -> {}".format(len(self.renamed), *self.renamed[0]))
        lines += self.problems()
        for kind, keys in (("not in the file", self.missing), ("not used", self.left_over)):
            lines += [f"{kind}: {by_part(group)} ({reason})" for reason, group in _by_reason(keys).items()]
        if self.skipped:
            lines.append(f"skipped: {by_part(self.skipped)}")
        lines += [f"note: {note}" for note in self.notes] + [f"advice: {advice}" for advice in self.advice]
        return "\n  ".join(lines)


class CheckpointMismatch(ValueError):
    """A file does not fit a network, which was left as it was; `report` says what would have gone where."""

    def __init__(self, message: str, report: CheckpointReport) -> None:
        super().__init__(message)
        self.report = report


def by_part(keys: Iterable[str], most: int = 6) -> str:
    """ "swinViT.layers1 (31), decoder1 (5)": how many of the keys lie in which part."""
    parts = Counter(_part(key) for key in keys)
    shown = ", ".join(f"{part} ({count})" if count > 1 else part for part, count in list(parts.items())[:most])
    rest = sum(list(parts.values())[most:])
    return f"{shown} and {rest} more" if rest else shown


def _part(key: str) -> str:
    path = key.split(".")
    return ".".join(path[:2]) if len(path) > 2 else key


def _by_reason(keys: Mapping[str, str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for key, reason in keys.items():
        if reason:
            groups.setdefault(reason, []).append(key)
    return groups


def percent(share: float) -> str:
    """At most one decimal, never rounded up to 100 %."""
    return f"{int(share * 1000) / 10:g} %"

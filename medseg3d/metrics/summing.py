"""What lets Python's ``sum`` add counts up."""

from __future__ import annotations

from typing import TypeVar

Counts = TypeVar("Counts", bound="Summable")


class Summable:
    """Counts to which ``+`` adds others of their kind: ``sum(parts)`` works as well, which begins with 0."""

    def __radd__(self: Counts, zero: int) -> Counts:
        return self if isinstance(zero, int) and zero == 0 else NotImplemented

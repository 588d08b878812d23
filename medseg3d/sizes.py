"""Sizes of memory and numbers of things as people write them."""

from __future__ import annotations

import re


def in_bytes(size: int | float | str) -> int:
    """A size in bytes: a number of them, or text with a unit, "6G" or "6 GiB" for 6 x 1024 x 1024 x 1024.

    Raises:
        ValueError: it is something else, or text without a unit, where bytes are hardly ever meant.
    """
    if isinstance(size, int | float):
        return int(size)
    text = str(size).strip()
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(?:i?B)?|B)", text, re.IGNORECASE)
    if match is None:
        hint = f": {text} bytes? say {text}G, or {text}B" if text.isdecimal() else ""
        raise ValueError(f"a size is a number with B, K, M, G or T, such as 6G or 800M; got {size!r}{hint}")
    return int(float(match[1]) * 1024 ** " KMGT".index((match[2] or " ").upper()))


def counted(number: int, what: str) -> str:
    """1 case, 2 cases."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"

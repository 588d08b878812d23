"""Cases in the rows of a CSV file."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medseg3d.io.formats import split_name

SPLITS = ("train", "validation", "test")
_COLUMNS = ("image", "label", "patient", "split", "fold")
_SPLIT_NAMES = {"train": "train", "training": "train", "val": "validation", "validation": "validation"}
_SPLIT_NAMES |= {"test": "test", "testing": "test", "": "train"}

Entry = tuple[str, Mapping[str, Any]]  # a split, and a case as a datalist has it


def csv_entries(path: Path, notes: list[str]) -> list[Entry]:
    """The rows; columns whose name in the first line is unknown go to the notes."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8 ({error}): save it as CSV UTF-8") from error
    first = text.split("\n", 1)[0]
    rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines(), delimiter=_delimiter(first))]
    rows = [row for row in rows if any(row)]
    columns = [cell.lower() for cell in rows[0]] if rows else []
    if "image" in columns:
        rows = rows[1:]
        notes += [
            f"the column {name!r} is not read: columns are {', '.join(_COLUMNS)}"
            for name in columns
            if name and name not in _COLUMNS
        ]
        if again := [name for name in _COLUMNS if columns.count(name) > 1]:
            raise ValueError(
                f"{path}: the first line names {', '.join(again)} more than once: a column has a name of its own; an "
                "image of several files is listed in JSON"
            )
    elif set(columns) & set(_COLUMNS):
        raise ValueError(f"{path}: the first line names columns, and none is image: {', '.join(columns)}")
    elif len(rows) > 1 and not split_name(rows[0][0])[1] and split_name(rows[1][0])[1]:
        raise ValueError(
            f"{path}: the first line {','.join(rows[0])!r} is no case, and as names of columns it must be "
            "image,label[,patient][,split][,fold]"
        )
    else:
        columns = list(_COLUMNS[:3])
    entries: list[Entry] = []
    for row in rows:
        if any(row[len(columns) :]):
            raise ValueError(f"{path}: a row has the columns {', '.join(columns)}, got {len(row)} of them: {row}")
        entry: dict[str, Any] = {key: cell for key, cell in zip(columns, row, strict=False) if key in _COLUMNS and cell}
        split = _SPLIT_NAMES.get(entry.pop("split", "").lower())
        if split is None or not str(entry.get("fold", 0)).removesuffix(".0").isdecimal():
            raise ValueError(f"{path}: a split is one of {', '.join(SPLITS)} and a fold a whole number, got {row}")
        entries.append((split, entry))
    if not entries:
        raise ValueError(f"{path} lists no case: a row has an image, its label and, if you like, the patient")
    return entries


def _delimiter(line: str) -> str:
    return max(",;\t", key=line.count)

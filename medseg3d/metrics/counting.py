"""How often pairs of numbers occur at the same place of two label maps, in little memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_PIECE = 1 << 20  # voxels counted at a time: some 30 MB of working memory
_TABLE = 1 << 16  # numbers up to here are looked up in a table, larger ones are searched


def joint_counts(
    rows: np.ndarray, columns: np.ndarray, row_numbers: Sequence[int], column_numbers: Sequence[int]
) -> np.ndarray:
    """(R + 1, C + 1) int64: how many voxels have the i-th of ``row_numbers`` in ``rows`` and the j-th of
    ``column_numbers`` in ``columns``. The last row and the last column count all other numbers.

    The two arrays of integers have one shape; they are read in pieces, so memory does not grow with them.
    """
    assert rows.shape == columns.shape
    turned = not rows.flags.c_contiguous and rows.flags.f_contiguous and columns.flags.f_contiguous
    flat_rows, flat_columns = (array.reshape(-1, order="F" if turned else "C") for array in (rows, columns))
    row_of, column_of = _Index(row_numbers), _Index(column_numbers)
    width = len(column_numbers) + 1
    counts = np.zeros((len(row_numbers) + 1) * width, np.int64)
    for start in range(0, flat_rows.size, _PIECE):
        piece = slice(start, start + _PIECE)
        pairs = row_of(flat_rows[piece]) * width + column_of(flat_columns[piece])
        counts += np.bincount(pairs, minlength=counts.size)
    return counts.reshape(-1, width)


class _Index:
    """The place of each number in a list, or the list's length where it is not in it."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self.places = np.argsort(np.asarray(numbers, np.int64), kind="stable")
        self.sorted = np.asarray(numbers, np.int64)[self.places]
        self.other = len(self.sorted)
        self.table: np.ndarray | None = None
        if not self.other or (self.sorted[0] >= 0 and self.sorted[-1] < _TABLE):
            self.table = np.full(_TABLE, self.other, np.intp)
            self.table[self.sorted] = self.places

    def __call__(self, values: np.ndarray) -> np.ndarray:
        if self.table is not None:
            if values.size and int(values.min()) >= 0 and int(values.max()) < _TABLE:
                return self.table[values]
            inside = (values >= 0) & (values < _TABLE)
            return np.where(inside, self.table[np.where(inside, values, 0)], self.other)
        found = np.searchsorted(self.sorted, values).clip(0, self.other - 1)
        return np.where(self.sorted[found] == values, self.places[found], self.other)

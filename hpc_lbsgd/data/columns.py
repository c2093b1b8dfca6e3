"""Columns of a table that is mapped into memory, as numpy arrays that were never read whole.

A column in one piece with no row left out is a view. Otherwise rows are looked up where they lie, so that opening a set
costs no memory that grows with it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

ROWS = 2**22  # looked at together where all are


class Rows:
    """Which rows of a table count: all but some, numbered anew."""

    def __init__(self, total: int, gone: np.ndarray):
        self.gone = gone  # row numbers, ascending (int64)
        self.shifted = gone - np.arange(len(gone))
        self.count = total - len(gone)

    def __len__(self) -> int:
        return self.count

    def at(self, index: np.ndarray) -> np.ndarray:
        """Where these rows lie in the table."""
        return index + np.searchsorted(self.shifted, index, side="right") if len(self.gone) else index


class Column(np.lib.mixins.NDArrayOperatorsMixin):
    """A column in several pieces, or with rows left out: an index or a slice makes an array; so does all at once, which
    is a copy."""

    def __init__(self, pieces: list[np.ndarray], rows: Rows):
        self.pieces, self.rows, self.dtype = pieces, rows, pieces[0].dtype
        self.ends = np.cumsum([len(piece) for piece in pieces])
        self._starts, self._shifted = (self.ends - [len(p) for p in pieces]).tolist(), rows.shifted.tolist()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        if isinstance(index, (int, np.integer)) and 0 <= index < len(self):  # one at a time: no arrays for it
            row = int(index) + bisect_right(self._shifted, index)
            piece = bisect_right(self._starts, row) - 1
            return self.pieces[piece][row - self._starts[piece]]
        if isinstance(index, slice):
            index = np.arange(*index.indices(len(self)))
        index = np.asarray(index)
        if index.dtype == bool:
            index = np.flatnonzero(index)
        if index.size and not (-len(self) <= index.min() and index.max() < len(self)):
            raise IndexError(f"row {index.max()} of {len(self)}")
        row = self.rows.at(np.where(index < 0, index + len(self), index))
        piece = np.searchsorted(self.ends, row, side="right")
        found = np.empty(row.shape + self.pieces[0].shape[1:], self.dtype)
        for number in np.unique(piece):
            mine = piece == number
            start = self.ends[number] - len(self.pieces[number])
            found[mine] = self.pieces[number][row[mine] - start]
        return found[()]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)

    def __array_ufunc__(self, function, method, *inputs, **named):
        return getattr(function, method)(*(np.asarray(i) if isinstance(i, Column) else i for i in inputs), **named)

    def tolist(self) -> list:
        return self[:].tolist()


class Lists:
    """A column of lists of any length; an index makes an array of each (items, numbers of an item)."""

    def __init__(self, chunks: list[pa.Array], rows: Rows):
        self.rows, self.pieces = rows, [(c.offsets.to_numpy(), numbers_in(c.values)) for c in chunks]
        self.starts = np.cumsum([0] + [len(offsets) - 1 for offsets, _ in self.pieces]).tolist()

    def __getitem__(self, index: np.ndarray) -> list[np.ndarray]:
        return [self._one(row) for row in self.rows.at(np.asarray(index)).tolist()]

    def _one(self, row: int) -> np.ndarray:
        piece = bisect_right(self.starts, row) - 1
        offsets, numbers = self.pieces[piece]
        first, last = offsets[row - self.starts[piece] : row - self.starts[piece] + 2].tolist()
        return numbers[first:last]


class Texts:
    """A column of texts; an index makes a list of them."""

    def __init__(self, column: pa.ChunkedArray, rows: Rows):
        self.column, self.rows = column, rows

    def __getitem__(self, index):
        if isinstance(index, (int, np.integer)):
            return self[[index]][0]
        return [self.column[row].as_py() for row in self.rows.at(np.asarray(index)).tolist()]


def column(table: pa.Table, name: str, rows: Rows) -> np.ndarray | Column | Lists | Texts:
    """A column without nulls: of numbers, of lists of as many (rows of an array), of lists of such lists, or of
    texts."""
    if pa.types.is_large_string(table.schema.field(name).type):
        return Texts(table.column(name), rows)
    if pa.types.is_large_list(table.schema.field(name).type):
        return Lists(table.column(name).chunks, rows)
    pieces = [numbers_in(chunk) for chunk in table.column(name).chunks]
    if len(pieces) == 1 and not len(rows.gone):
        return pieces[0]
    return Column(pieces or [numbers_in(pa.array([], table.schema.field(name).type))], rows)


def numbers_in(piece: pa.Array) -> np.ndarray:
    """The numbers of a piece of a column, (rows,) or (rows, numbers of a list): a view."""
    if pa.types.is_fixed_size_list(piece.type):
        return piece.flatten().to_numpy().reshape(len(piece), piece.type.list_size)
    return piece.to_numpy()


def flat(chunks: list[pa.Array]) -> list[pa.Array]:
    """What a column of lists is made of: how long they are, then what is in them; of others the column itself."""
    found = []
    if chunks and pa.types.is_large_list(chunks[0].type):
        found, chunks = [pc.list_value_length(chunk) for chunk in chunks], [chunk.flatten() for chunk in chunks]
    if chunks and pa.types.is_fixed_size_list(chunks[0].type):
        chunks = [chunk.flatten() for chunk in chunks]
    return [*found, *chunks]


def rows_named(table: pa.Table, name: str, wanted: set[str]) -> tuple[np.ndarray, list[str]]:
    """(numbers, texts) of the rows whose text is wanted, a few million looked at at a time."""
    values = pa.array(sorted(wanted), pa.large_string())
    numbers, texts, start = [np.empty(0, np.int64)], [], 0
    for chunk in table.column(name).chunks:
        for first in range(0, len(chunk), ROWS):
            some = chunk.slice(first, ROWS)
            found = pc.indices_nonzero(pc.is_in(some, value_set=values))
            if len(found):
                numbers.append(found.to_numpy().astype(np.int64) + start + first)
                texts += some.take(found).to_pylist()
        start += len(chunk)
    return np.concatenate(numbers), texts


def slices(count: int) -> Iterator[slice]:
    """All rows, a few million at a time."""
    return (slice(first, min(first + ROWS, count)) for first in range(0, count, ROWS))

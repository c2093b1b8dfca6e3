"""What a sample has beside its image and its class: fields of numbers, boxes and masks, by name.

Numbers are a column of the manifest, field.NAME, and its Arrow type says what they are: int64 or float64, one a sample,
or a list of as many for each; lists of any length of such lists are boxes (boxes.py). A mask is a file of its own
(masks.py): columns mask.NAME:path, :bytes, :checksum, and in tar files :offset, in the shard of its image. Image and
class are fields too, with columns of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from hpc_lbsgd.errors import RequestError

IMAGE, CLASS = "image", "class"
RESERVED = (IMAGE, CLASS)
PREFIX, MASK = "field.", "mask."  # of columns: a table may well have a field called width
KINDS = {pa.int64(): "int", pa.float64(): "float"}
NOWHERE = 255  # the class in a mask of what counts for nothing, and of what lies outside an image
LARGEST = float(np.finfo(np.float32).max)  # what a model is given is float32


class Field(NamedTuple):
    kind: str  # image, class, int, float, boxes or mask
    length: int | None = None  # numbers of a list, or of a box; None: one number. Of a mask: classes

    @property
    def width(self) -> int:
        """Numbers that a model is to give for it; of boxes nobody can say."""
        if self.kind == "boxes":
            return 0
        return 1 if self.length is None else self.length

    def __str__(self) -> str:
        if self.kind == "mask":
            return f"mask of {self.length} classes"
        if self.kind == "boxes":
            return f"boxes of {self.length} numbers"
        return self.kind if self.length is None else f"{self.length} {self.kind}s"


def of_type(column: pa.DataType) -> Field:
    """Raises ValueError for a type that no field has."""
    if pa.types.is_large_list(column) and of_type(column.value_type).kind == "float":
        return Field("boxes", of_type(column.value_type).length)
    length = column.list_size if pa.types.is_fixed_size_list(column) else None
    kind = KINDS.get(column if length is None else column.value_type)
    if kind is None or length == 0:
        raise ValueError(f"no field has the type {column}")
    return Field(kind, length)


def of_schema(schema: pa.Schema, masks: Mapping[str, Sequence[int]]) -> dict[str, Field]:
    """The fields of a manifest's columns, but for image and class. masks: classes that are in them. Raises ValueError
    as `of_type` does, KeyError for a mask without its columns."""
    found = {c.name.removeprefix(PREFIX): of_type(c.type) for c in schema if c.name.startswith(PREFIX)}
    for name, classes in masks.items():
        for what in ("path", "bytes", "checksum"):
            schema.field(f"{MASK}{name}:{what}")
        found[name] = Field("mask", 1 + max((c for c in classes if c != NOWHERE), default=0))
    return found


def columns_of(table: pa.Table) -> pa.Table:
    """A manifest's columns of fields alone."""
    return table.select([name for name in table.column_names if name.startswith((PREFIX, MASK))])


def content_of(table: pa.Table) -> pa.Table:
    """The same without where masks lie, which is no part of what they are."""
    found = columns_of(table)
    return found.select([name for name in found.column_names if not name.endswith(":offset")])


def outputs(targets: Sequence[str], fields: Mapping[str, Field], classes: int) -> int:
    """How many numbers a model is to give a sample for these targets: one a class, one a number."""
    return sum(classes if fields[name].kind == CLASS else fields[name].width for name in targets)


def refuse_unknown(targets: Sequence[str], fields: Mapping[str, Field], where: str) -> None:
    """Raise RequestError for targets that a set does not have."""
    there = [name for name in fields if name != IMAGE]
    missing = next((name for name in targets if name not in there), None)
    if missing:
        asked, known = ", ".join(targets), ", ".join(there) or "none"
        raise RequestError(f"data.targets = [{asked}]: {where} has no field {missing!r}; it has: {known}")


# ---------------------------------------------------------------- from a table's values


class NoField(ValueError):
    """Values that are no field. row: of the first one that is wrong. other: it is no number at all."""

    def __init__(self, row: int, what: str, other: bool = False):
        super().__init__(what)
        self.row, self.other = row, other


def column_of(values: Sequence, as_floats: bool = False) -> pa.Array:
    """A field's column from values as Python has them: numbers, or lists of them. Whole numbers alone are int, else all
    are float, or where `as_floats` says so. Raises NoField where a value is missing or not finite, or is no number."""
    lists = isinstance(next((v for v in values if v is not None), None), list)
    length, whole, flat = None, not as_floats, []
    for row, value in enumerate(values):
        items = value if lists and isinstance(value, list) else [value]
        if lists and isinstance(value, list):
            length = len(value) if length is None else length
            if len(value) != length or not length:
                raise NoField(row, f"has {len(value)} numbers where rows before it have {length}")
        for item in items:
            check(row, item)
            whole = whole and isinstance(item, int)
        if lists and not isinstance(value, list):
            raise NoField(row, f"is {value!r}, and other rows have lists")
        flat += items
    if not whole:
        rounded = next((i for i, v in enumerate(flat) if isinstance(v, int) and int(float(v)) != v), None)
        if rounded is not None:
            raise NoField(
                rounded // (length or 1), f"is {flat[rounded]}, which no float is, among numbers with a point"
            )
    numbers = pa.array(np.array(flat, np.int64 if whole else np.float64))
    return numbers if length is None else pa.FixedSizeListArray.from_arrays(numbers, length)


def check(row: int, value: object) -> None:
    if value is None:
        raise NoField(row, "has no value")
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise NoField(row, f"is {value}, beyond 64 bits")
    elif not isinstance(value, float):
        raise NoField(row, f"is {str(value)[:40]!r}, no number", other=True)
    elif not math.isfinite(value):
        raise NoField(row, f"is {value}, not finite")
    elif abs(value) > LARGEST:
        raise NoField(row, f"is {value}, beyond float32")


def row_of(table: pa.Table, row: int) -> dict:
    """Numbers of a row, by name."""
    own = [name for name in table.column_names if name.startswith(PREFIX)]
    return {name.removeprefix(PREFIX): table.column(name)[row].as_py() for name in own}

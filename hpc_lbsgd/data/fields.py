"""What a sample has beside its image and its class: fields of numbers, texts, boxes, masks, images and bytes, by name.

Numbers are a column of the manifest, field.NAME, and its Arrow type says what they are: int64 or float64, one a sample,
or a list of as many for each; lists of any length of such lists are boxes (boxes.py); a string is a text. Masks
(masks.py), further images and bytes are files of their own (files.py): columns KIND.NAME:path, :bytes, :checksum, and
in tar files :offset, in the shard of the image. Image and class are fields too, with columns of their own.
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
PREFIX = "field."  # of columns: a table may well have a field called width
FILES = ("mask", "image", "bytes")  # kinds that are files; what their columns begin with
FILE_TYPES = {"path": pa.large_string(), "bytes": pa.int64(), "checksum": pa.uint64(), "offset": pa.int64()}
SAID = ("text", *FILES, "boxes")  # kinds that --fields NAME:KIND may say
KINDS = {pa.int64(): "int", pa.float64(): "float", pa.large_string(): "text"}
LONGEST_NAME = 60  # bytes of the name of a field that is a file
LONGEST_TEXT = 2**20  # bytes in UTF-8: it lies in the manifest
NOWHERE = 255  # the class in a mask of what counts for nothing, and of what lies outside an image
LARGEST = float(np.finfo(np.float32).max)  # what a model is given is float32


class Field(NamedTuple):
    kind: str  # image, class, int, float, text, boxes, mask or bytes
    length: int | None = None  # numbers of a list, or of a box; None: one number. Of a mask: classes

    @property
    def width(self) -> int:
        """Numbers that a model is to give for it; 0 where nobody can say."""
        if self.kind in ("boxes", "text", "image", "bytes"):
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
    if kind is None or length == 0 or (kind == "text" and length is not None):
        raise ValueError(f"no field has the type {column}")
    return Field(kind, length)


def of_schema(schema: pa.Schema, masks: Mapping[str, Sequence[int]]) -> dict[str, Field]:
    """The fields of a manifest's columns, but for image and class. masks: classes that are in them. Raises ValueError
    as `of_type` does, or for columns of other types, KeyError for a file without its columns, or a mask without its
    classes."""
    found = {c.name.removeprefix(PREFIX): of_type(c.type) for c in schema if c.name.startswith(PREFIX)}
    for column in schema:
        kind, _, rest = column.name.partition(".")
        name, _, what = rest.rpartition(":")
        if kind in FILES and what == "path":
            for more, wanted in FILE_TYPES.items():
                if more != "offset" or "offset" in schema.names:  # in tar files
                    found_type = schema.field(file_column(kind, name, more)).type
                    if found_type != wanted:
                        raise ValueError(f"column {file_column(kind, name, more)}: {found_type}, expected {wanted}")
            classes = masks[name] if kind == "mask" else None
            length = None if classes is None else 1 + max((c for c in classes if c != NOWHERE), default=0)
            found[name] = Field(kind, length)
    return found


def file_column(kind: str, name: str, what: str) -> str:
    """The column of a field that is a file. what: path, bytes, checksum or offset."""
    return f"{kind}.{name}:{what}"


def columns_of(table: pa.Table) -> pa.Table:
    """A manifest's columns of fields alone."""
    own = (PREFIX, *(f"{kind}." for kind in FILES))
    return table.select([name for name in table.column_names if name.startswith(own)])


def content_of(table: pa.Table) -> pa.Table:
    """The same without where files lie, which is no part of what they are."""
    found = columns_of(table)
    return found.select([name for name in found.column_names if not name.endswith(":offset")])


def outputs(targets: Sequence[str], fields: Mapping[str, Field], classes: int) -> int:
    """How many numbers a model is to give a sample for these targets: one a class, one a number."""
    return sum(classes if fields[name].kind == CLASS else fields[name].width for name in targets)


def refuse_unknown(data, fields: Mapping[str, Field], where: str) -> None:
    """Raise RequestError for inputs or targets of a recipe's `data` section that a set does not have, and for texts
    that nothing makes numbers of."""
    for key, asked in (("inputs", data.inputs), ("targets", data.targets)):
        for name in asked:
            said = f"data.{key} = [{', '.join(asked)}]"
            if name not in fields:
                raise RequestError(f"{said}: {where} has no field {name!r}; it has: {', '.join(fields)}")
            if fields[name].kind == "text" and name not in data.encode:
                raise RequestError(
                    f"{said}: {name} is text, and how it becomes numbers is yours to say: data.encode = "
                    f"{{{name}: package.module:function}}"
                )
    for name in data.encode:
        if name not in {*data.inputs, *data.targets}:
            raise RequestError(f"data.encode: {name} is none of data.inputs and data.targets")
        if fields[name].kind not in ("text", "bytes"):
            raise RequestError(f"data.encode: {name} of {where} is {fields[name]}; it is for text and bytes")


def refuse_name(name: str, where: str) -> None:
    """Raise RequestError for a field that is a file, whose name is part of that file's in a pack."""
    if "/" in name or len(name.encode()) > LONGEST_NAME or name in RESERVED:
        raise RequestError(
            f"{where}: {name!r}: the name of a field that is a file is part of that file's in a pack; make it short, "
            f"without /, and none of {', '.join(RESERVED)}"
        )


def asked(wanted: Sequence[str]) -> dict[str, str | None]:
    """{name: kind} of words NAME or NAME:KIND; None: what it is shows by itself."""
    found: dict[str, str | None] = {}
    for word in wanted:
        name, _, kind = word.rpartition(":")
        if name and kind in SAID:
            found[name] = kind
        else:
            found[word] = None
    return found


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


def texts_of(values: Sequence) -> pa.Array:
    """A column of texts. Raises NoField for what is none, is not UTF-8, or is too long to lie in a manifest."""
    for row, value in enumerate(values):
        if value is None:
            raise NoField(row, "has no value")
        if not isinstance(value, str):
            raise NoField(row, f"is {str(value)[:40]!r}, no text")
        try:
            size = len(value.encode())
        except UnicodeEncodeError:
            raise NoField(row, "is not UTF-8") from None
        if size > LONGEST_TEXT:
            raise NoField(row, f"is a text of {size} bytes, {LONGEST_TEXT} are allowed: keep it in a file, as bytes")
    return pa.array(values, pa.large_string())


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
    """Numbers and texts of a row, by name."""
    own = [name for name in table.column_names if name.startswith(PREFIX)]
    return {name.removeprefix(PREFIX): table.column(name)[row].as_py() for name in own}

"""What a manifest must be before anything is read by it. A digest finds what a disk changed; this finds what a person,
or a stranger, wrote."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, Field, ValidationError

Name = Annotated[str, Field(pattern="^[^\0]+$")]
# Of a file in a folder: copies are made and removed by it. Not "." or "..", and no way to another folder
FileName = Annotated[str, Field(pattern="^[^/\0]*[^/.\0][^/\0]*$")]
Count = Annotated[int, Field(ge=0, lt=2**62)]


class Shard(BaseModel, strict=True):
    name: FileName  # in root
    bytes: Count
    checksum: str | None


class Header(BaseModel, strict=True):
    """What a manifest says of all its samples; what else is in it is for people."""

    root: Name
    classes: list[str]
    fingerprint: str
    digest: str | None = None
    shards: list[Shard] = []
    raw_channels: Annotated[int, Field(ge=1, le=3)] | None = None  # a Literal would take true for 1
    masks: dict[str, list[Annotated[int, Field(ge=0, le=255)]]] = {}
    own: list[Annotated[tuple[str, str, list[Count]], Field(strict=False)]] | None = None  # JSON has lists
    escaped: bool = False
    decoders: dict[str, str] = {}
    left_out: dict[str, int] = {}


def check_header(header: Any) -> None:
    """Raises ValueError."""
    try:
        Header.model_validate(header)
    except ValidationError as problem:
        first = problem.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc'])) or 'header'}: {first['msg'].lower()}") from None


def check_columns(table: pa.Table, schema: pa.Schema) -> None:
    """Every column is there, with a value in each row; but old manifests, and samples that are no encoded image, have
    no orientation. Raises ValueError."""
    for field in schema:
        if field.name == "orientation":
            continue
        found = table.column(field.name)
        if found.type != field.type:
            raise ValueError(f"column {field.name}: {found.type}, expected {field.type}")
    for name in table.column_names:
        if name != "orientation" and table.column(name).null_count:
            raise ValueError(f"column {name}: a row without a value")


def misplaced(m, rows: slice) -> int | None:
    """The first of these rows of a Manifest whose sample, or a file beside it, cannot lie where it says: outside its
    shard, or smaller than its pixels."""
    sizes, heights, widths = (np.asarray(c[rows]).astype(np.int64) for c in (m.sizes, m.heights, m.widths))
    wrong = (sizes < 0) | (heights < 0) | (widths < 0)
    files = [(sizes, m.offsets if m.shards else None)]
    for name in m.files:
        offsets = m.of_file(name, "offset") if m.shards else None
        files.append((np.asarray(m.of_file(name, "bytes")[rows]), offsets))
    wrong |= np.any([some < 0 for some, _ in files], axis=0)
    if m.shards:
        shard = np.asarray(m.shard_of[rows])
        known = (shard >= 0) & (shard < len(m.shards))
        ends = np.array([s["bytes"] for s in m.shards], np.int64)[np.where(known, shard, 0)]
        wrong |= ~known
        for some, column in files:
            offsets = np.asarray(column[rows])
            wrong |= (offsets < 0) | (some > ends) | (offsets > ends - some)  # no sum that could wrap
    if m.raw_channels:
        for name in (None, *m.of_kind("image")):
            some = sizes if name is None else np.asarray(m.of_file(name, "bytes")[rows])
            wrong |= heights * widths > some // m.raw_channels  # int32 each: their product fits
    return rows.start + int(np.argmax(wrong)) if wrong.any() else None

"""What a manifest must be before anything is read by it. A digest finds what a disk changed; this finds what a person,
or a stranger, wrote."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, Field, ValidationError

Name = Annotated[str, Field(pattern="^[^\0]+$")]


class Shard(BaseModel, strict=True):
    name: Name  # below root
    bytes: Annotated[int, Field(ge=0, lt=2**62)]


class Header(BaseModel, strict=True):
    """What a manifest says of all its samples; what else is in it is for people."""

    root: Name
    classes: list[str]
    fingerprint: str
    shards: list[Shard] = []
    raw_channels: Literal[1, 3] | None = None
    masks: dict[str, list[int]] = {}
    escaped: bool = False


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
        if found.null_count:
            raise ValueError(f"column {field.name}: a row without a value")


def misplaced(m, rows: slice) -> int | None:
    """The first of these rows of a Manifest whose sample cannot lie where it says: outside its shard, or smaller than
    its pixels."""
    sizes, heights, widths = (np.asarray(c[rows]).astype(np.int64) for c in (m.sizes, m.heights, m.widths))
    wrong = (sizes < 0) | (heights < 0) | (widths < 0)
    if m.shards:
        shard, offsets = np.asarray(m.shard_of[rows]), np.asarray(m.offsets[rows])
        known = (shard >= 0) & (shard < len(m.shards))
        ends = np.array([s["bytes"] for s in m.shards], np.int64)[np.where(known, shard, 0)]
        wrong |= ~known | (offsets < 0) | (sizes > ends) | (offsets > ends - sizes)  # no sum that could wrap
    if m.raw_channels:
        wrong |= heights * widths > sizes // m.raw_channels  # int32 each: their product fits
    return rows.start + int(np.argmax(wrong)) if wrong.any() else None

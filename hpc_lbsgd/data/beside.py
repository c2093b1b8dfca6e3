"""What `data index TAR --fields` finds beside images of a WebDataset: KEY.json has numbers, KEY.NAME.png is a mask."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from hpc_lbsgd.data import boxes, masks, parts
from hpc_lbsgd.data.fields import CLASS, PREFIX, RESERVED, NoField, column_of
from hpc_lbsgd.data.manifest import Row, listed, with_columns
from hpc_lbsgd.errors import RequestError


class Member(NamedTuple):
    """A regular file inside a tar: where its bytes lie in the outermost file."""

    shard: int
    name: str
    offset: int
    size: int

    @property
    def key(self) -> tuple[int, str]:
        """WebDataset's key, in its shard: up to the first dot of the file's name."""
        folder, _, base = self.name.rpartition("/")
        return self.shard, f"{folder}/{base.split('.')[0]}"

    @property
    def field(self) -> str:
        """WebDataset's field: from the first dot of the file's name on."""
        return f".{self.name.rpartition('/')[2].partition('.')[2]}".lower()


class Fields(NamedTuple):
    """Of each image in order."""

    numbers: dict[str, list]  # by name; None where there is none
    masks: dict[str, list[Member]]

    def of(self, samples: Sequence[int]) -> Fields:
        picked = ({name: [found[i] for i in samples] for name, found in part.items()} for part in self)
        return Fields(*picked)


def fields_of(
    images: list[Member], said: Mapping[tuple[int, str], dict], wanted: list[str], left_out: Counter[str]
) -> tuple[list[Member], Fields]:
    """(the images that samples are of, their fields). said: contents of .json files. Raises RequestError for a sample
    with several images, or without one of its masks."""
    inputs = [i for i in images if i.field == os.path.splitext(i.name)[1].lower()]
    keys = Counter(i.key for i in inputs)
    if several := next((i for i in inputs if keys[i.key] > 1), None):
        raise RequestError(
            f"{several.name}: a sample has several images: {', '.join(m.name for m in inputs if m.key == several.key)}"
        )
    found: dict[str, dict] = {}
    for image in images:
        name, suffix = os.path.splitext(image.field)
        name = name.removeprefix(".") if suffix else ""  # the field of an input is its suffix alone
        if name in wanted and suffix in masks.SUFFIXES:
            found.setdefault(name, {})[image.key] = image
        elif name and image.key in keys:
            left_out[f"{image.field} beside an image"] += 1
    for name, mine in found.items():
        missing = [i.name for i in inputs if i.key not in mine]
        if missing:
            raise RequestError(f"{len(missing)} images have no {name} beside them:\n{listed(missing)}")
    rest = [name for name in wanted if name != CLASS and name not in found]
    numbers = {name: [said.get(i.key, {}).get(name) for i in inputs] for name in sorted(rest)}
    return inputs, Fields(numbers, {name: [mine[i.key] for i in inputs] for name, mine in sorted(found.items())})


def json_in(data: bytes) -> dict:
    """What a .json file says by name."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def columns_of(found: Fields, names: Sequence[str], floats: Collection[str]) -> pa.Table | None:
    """Columns of numbers. names: of the images, for people."""
    columns = {}
    for name, values in found.numbers.items():
        try:
            if name in RESERVED:
                raise NoField(0, f"is not the {name} of a sample")
            mine = boxes.column_of(values) if boxes.named(name, values) else column_of(values, name in floats)
            columns[PREFIX + name] = mine
        except NoField as problem:
            raise RequestError(f"--fields: {name!r} of {names[problem.row]} {problem} (in .json, or a mask)") from None
    return pa.table(columns) if columns else None


def examined(
    found: Fields,
    paths: list[Path],
    work: list[tuple[int, list[int]]],
    out: Path,
    processes: int | None,
    share: parts.Share,
) -> dict[str, dict[int, masks.Seen | str]]:
    """Masks by name and sample. work: (shard, samples) of each piece."""
    seen = {}
    for name, members in found.masks.items():
        jobs = [(str(paths[shard]), [members[i][2:] for i in some]) for shard, some in work]
        pieces = [parts.Work(masks.examine_in_tar, masks.identities_in_tar, job, len(job[1])) for job in jobs]
        rows = parts.rows(out, pieces, f"indexing {name}", processes, share)
        mine = share.of(work)
        seen[name] = {
            i: mask for (_, some), made in zip(mine, rows, strict=True) for i, mask in zip(some, made, strict=True)
        }
    return seen


def checked(rows: list[Row | str], samples: list[int], seen: dict) -> list[Row | str]:
    """Images' rows, or what is wrong with them or their masks."""
    for name, mine in seen.items():
        rows = [masks.beside(name, row, mine[i]) for i, row in zip(samples, rows, strict=True)]
    return rows


def table_of(
    found: Fields, samples: list[int], seen: dict, names: Sequence[str], floats: Collection[str]
) -> tuple[pa.Table | None, dict]:
    """(columns of fields, classes in each mask) of these samples."""
    some = found.of(samples)
    table, classes = columns_of(some, names, floats), {}
    for name, members in some.masks.items():
        mine = [seen[name][i] for i in samples]
        own, classes[name] = masks.table_of(name, [m.name for m in members], mine, [m.offset for m in members])
        table = with_columns(table, own)
    return table, classes

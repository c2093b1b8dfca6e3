"""What `data index TAR --fields` finds beside images of a WebDataset: KEY.json has numbers and texts, KEY.NAME.txt is a
text, KEY.NAME.png a mask, or an image or bytes where NAME:KIND says so, as KEY.NAME and KEY.NAME.anything may be."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from hpc_lbsgd.data import boxes, files, masks, parts
from hpc_lbsgd.data.fields import CLASS, LONGEST_TEXT, PREFIX, RESERVED, NoField, asked, refuse_name
from hpc_lbsgd.data.manifest import SUFFIXES, Row, listed, with_columns
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

    values: dict[str, list]  # numbers, boxes and texts by name; None where there is none
    files: dict[tuple[str, str], list[Member]]  # by kind and name

    def of(self, samples: Sequence[int]) -> Fields:
        picked = ({name: [found[i] for i in samples] for name, found in part.items()} for part in self)
        return Fields(*picked)


class Beside:
    """What is collected of a WebDataset while its members are listed. wanted: as `fields.asked` has it."""

    def __init__(self, wanted: Sequence[str]):
        self.kinds = asked(wanted)
        self.said: dict[tuple[int, str], dict] = {}  # by the key of a sample: what its .json says
        self.texts: dict[str, dict[tuple[int, str], str]] = {}
        self.members: dict[str, dict[tuple[int, str], Member]] = {}

    def take(self, member: Member, read: Callable[[], bytes]) -> bool:
        """A member that is no image is a text or bytes that are wanted. Raises RequestError for a text that is none."""
        whole = member.field.removeprefix(".")
        for name in (whole, os.path.splitext(whole)[0]):
            kind = self.kinds.get(name)
            if kind == "text":
                if member.size > LONGEST_TEXT:
                    raise RequestError(f"{member.name}: a text of {member.size} bytes; {LONGEST_TEXT} are allowed")
                mine = self.texts.setdefault(name, {})
                if member.key in mine:
                    raise RequestError(f"{member.name}: a second text {name} of one sample")
                try:
                    mine[member.key] = read().decode()
                except UnicodeDecodeError:
                    raise RequestError(f"{member.name}: is not UTF-8, and {name} is asked for as text") from None
            elif kind == "bytes":
                self._keep(name, member)
            if kind in ("text", "bytes"):
                return True
        return False

    def _keep(self, name: str, member: Member) -> None:
        refuse_name(name, member.name)
        mine = self.members.setdefault(name, {})
        if member.key in mine:
            raise RequestError(f"{member.name} and {mine[member.key].name}: both are {name} of one sample")
        mine[member.key] = member

    def fields(self, images: list[Member], left_out: Counter[str]) -> tuple[list[Member], Fields]:
        """(the images that samples are of, their fields). Raises RequestError for a sample with several images, or
        without one of its files."""
        inputs = [i for i in images if i.field in SUFFIXES]
        keys = Counter(i.key for i in inputs)
        if several := next((i for i in inputs if keys[i.key] > 1), None):
            names = ", ".join(m.name for m in inputs if m.key == several.key)
            raise RequestError(f"{several.name}: a sample has several images: {names}")
        for image in images:
            name, suffix = os.path.splitext(image.field.removeprefix("."))
            kind = self.kinds.get(name, "")
            if suffix and (kind in ("image", "bytes") or (kind in (None, "mask") and suffix in masks.SUFFIXES)):
                self._keep(name, image)
            elif suffix:
                left_out[f"{image.field} {'beside an' if image.key in keys else 'without its'} image"] += 1
        for name, mine in (*self.members.items(), *self.texts.items()):
            if orphans := len(mine.keys() - keys.keys()):
                left_out[f"{name} without its image"] += orphans
        for name, mine in self.members.items():
            missing = [i.name for i in inputs if i.key not in mine]
            if missing:
                raise RequestError(f"{len(missing)} images have no {name} beside them:\n{listed(missing)}")
        rest = sorted(name for name in self.kinds if name != CLASS and name not in self.members)
        values = {name: [self._said(name, i.key) for i in inputs] for name in rest}
        members = {(self.kinds[name] or "mask", name): [mine[i.key] for i in inputs]
                   for name, mine in sorted(self.members.items())}  # fmt: skip
        return inputs, Fields(values, members)

    def _said(self, name: str, key: tuple[int, str]) -> object:
        found = self.texts.get(name, {}).get(key)
        return self.said.get(key, {}).get(name) if found is None else found


def json_in(data: bytes) -> dict:
    """What a .json file says by name."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def columns_of(
    found: Fields, kinds: Mapping[str, str | None], names: Sequence[str], floats: Collection[str]
) -> pa.Table | None:
    """Columns of numbers, boxes and texts. names: of the images, for people."""
    columns = {}
    for name, values in found.values.items():
        try:
            if name in RESERVED:
                raise NoField(0, f"is not the {name} of a sample")
            if kinds[name] in ("image", "mask", "bytes"):
                raise NoField(0, f"has no file: {kinds[name]} is asked for")
            columns[PREFIX + name] = boxes.column_for(name, kinds[name], values, name in floats)
        except NoField as problem:
            raise RequestError(f"--fields: {name!r} of {names[problem.row]} {problem} (in .json, or a file)") from None
    return pa.table(columns) if columns else None


def examined(
    found: Fields,
    paths: list[Path],
    work: list[tuple[int, list[int]]],
    out: Path,
    processes: int | None,
    share: parts.Share,
) -> dict[tuple[str, str], dict[int, files.Seen | str]]:
    """Files by kind, name and sample. work: (shard, samples) of each piece."""
    return {
        (kind, name): looked_at(kind, members, paths, work, out, f"indexing {name}", processes, share)
        for (kind, name), members in found.files.items()
    }


def looked_at(
    kind: str,
    members: Sequence[Member],
    paths: list[Path],
    work: list[tuple[int, list[int]]],
    out: Path,
    title: str,
    processes: int | None,
    share: parts.Share,
) -> dict[int, files.Seen | str]:
    """What the member of each sample is, by sample. work: as for `examined`."""
    jobs = [(str(paths[shard]), [members[i][2:] for i in some], kind) for shard, some in work]
    pieces = [parts.Work(files.examine_in_tar, files.identities_in_tar, job, len(job[1])) for job in jobs]
    rows = parts.rows(out, pieces, title, processes, share)
    made = zip(share.of(work), rows, strict=True)
    return {i: seen for (_, some), found in made for i, seen in zip(some, found, strict=True)}


def checked(rows: list[Row | str], samples: list[int], seen: Mapping) -> list[Row | str]:
    """Images' rows, or what is wrong with them or what lies beside them."""
    for (kind, name), mine in seen.items():
        rows = [files.beside(kind, name, row, mine[i]) for i, row in zip(samples, rows, strict=True)]
    return rows


def table_of(
    found: Fields,
    kinds: Mapping[str, str | None],
    samples: list[int],
    seen: Mapping,
    names: Sequence[str],
    floats: Collection[str],
) -> tuple[pa.Table | None, dict]:
    """(columns of fields, classes in each mask) of these samples."""
    some = found.of(samples)
    table, classes = columns_of(some, kinds, names, floats), {}
    for (kind, name), members in some.files.items():
        mine = [seen[kind, name][i] for i in samples]
        own, classes_in = files.table_of(kind, name, [m.name for m in members], mine, [m.offset for m in members])
        classes |= {name: classes_in} if kind == "mask" else {}
        table = with_columns(table, own)
    return table, classes

"""The list of a data set's images: path, label, width, height, size in bytes, checksum, orientation, and what fields
they have beside their class (fields.py).

A manifest is one Arrow file, mapped into memory, never read whole: at 1.28 million images each rank of a node
shares the same pages. Rows are sorted by class and name, so a manifest is a function of the files alone.

Images lie in files below `root`, or in tar shards there (`data pack`, or an archive that was indexed): then two more
columns say in which shard and where, and `root` may be an address (elsewhere.py). Lists beside a manifest,
such as `exclude.txt` of `data verify`, take rows away (names.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hpc_lbsgd.data import columns, elsewhere, fields, sound
from hpc_lbsgd.data.decode import decoders
from hpc_lbsgd.data.names import FILE_NAME as FILE_NAME
from hpc_lbsgd.data.names import escaped, is_utf8, lists_of, read_excluded, unescaped
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.urls import checked, is_url

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff"}
NAMED_AT_MOST = 20  # problems listed by name before "and N more"
FILES_CHECKED_AT_START = 100_000  # above it, a start looks at a random selection; `data verify` looks at all
ROWS_CHECKED_AT_START = 10_000_000  # above it, of labels and sizes only these are looked at:
STRETCHES, STRETCH = 100, 10_000  # stretches of rows, for single ones would be a seek each
CHUNK = 512  # files a work item of indexing

SCHEMA = pa.schema(
    [
        ("path", pa.large_string()),
        ("label", pa.int32()),  # 0 in a set without classes
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("bytes", pa.int64()),
        ("checksum", pa.uint64()),
        ("orientation", pa.int8()),  # EXIF's; width and height are those of the stored pixels, before they are turned
    ]
)
Row = tuple[int, int, int, int, int]  # width, height, bytes, checksum, orientation of an image
PACKED_SCHEMA = SCHEMA.append(pa.field("shard", pa.int32())).append(pa.field("offset", pa.int64()))
PARTS = ".parts"  # in a folder of shards while it is packed


def content_digest(table: pa.Table, header: Mapping) -> str:
    """Of all that a manifest says, but for where its images lie: 64 bits of BLAKE2b, hexadecimal.

    Raises ValueError for columns whose bytes cannot be what was written.
    """
    known = {k: v for k, v in header.items() if k not in ("root", "digest")}
    digest = hashlib.blake2b(json.dumps(known, sort_keys=True).encode(), digest_size=8)
    table.validate(full=True)  # offsets that lead out of a column would end the process
    for name in table.column_names:  # however the rows lie in pieces
        chunks = columns.flat(table.column(name).chunks)
        digest.update(f"{name} {table.column(name).type} {table.num_rows}".encode())
        for piece in (chunk.slice(at, 2**20) for chunk in chunks for at in range(0, len(chunk), 2**20)):
            values = pc.binary_length(piece) if pa.types.is_large_string(piece.type) else piece
            values = values.fill_null(-1) if values.null_count else values  # an orientation that nobody asked for
            digest.update(np.ascontiguousarray(values.to_numpy(zero_copy_only=False)))
        for chunk in chunks if pa.types.is_large_string(table.column(name).type) else ():
            starts = np.frombuffer(chunk.buffers()[1], np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
            digest.update(memoryview(chunk.buffers()[2] or b"")[starts[0] : starts[-1]])
    return digest.hexdigest()


def checksum(data: bytes | np.ndarray) -> int:
    """64 bits of BLAKE2b of a file's content."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


class Manifest:
    """A manifest file, opened. Columns are read-only, of shape (N,): numpy arrays, or what gives them by index
    (columns.py)."""

    def __init__(self, path: Path):
        self.path = Path(path)
        try:
            self.table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
            self.header = json.loads(self.table.schema.metadata[b"hpc_lbsgd"])
            sound.check_header(self.header)
            sound.check_columns(self.table, PACKED_SCHEMA if self.header.get("shards") else SCHEMA)
            root = self.header["root"]
            self.remote = is_url(root)  # shards lie elsewhere
            self.root = checked(root, "root") if self.remote else (self.path.parent / root).resolve()
            self.classes: list[str] = self.header["classes"]
            self.own_fields = fields.of_schema(self.table.schema, self.header.get("masks", {}))
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError, RecursionError) as problem:
            raise RequestError(f"{path}: not a manifest ({problem}); make one with: hpc-lbsgd data index DIR") from None
        image = {} if self.own else {fields.IMAGE: fields.Field(fields.IMAGE)}
        class_field = {fields.CLASS: fields.Field(fields.CLASS)} if self.classes else {}
        self.fields = {**image, **class_field, **self.own_fields}
        self.kept = None  # what a run keeps of it on this node
        self._as_written, self._columns = self.table, {}
        self.excluded: list[str] = []
        self.rows = columns.Rows(self.table.num_rows, np.empty(0, np.int64))
        if unwanted := read_excluded(lists_of(self.path)):
            if self.header.get("escaped"):
                unwanted = {escaped(name) for name in unwanted}
            unwanted = {name for name in unwanted if is_utf8(name)}  # others are in no table
            gone, self.excluded = columns.rows_named(self.table, "path", unwanted)
            self.rows = columns.Rows(self.table.num_rows, gone)

    @property
    def shards(self) -> list[dict]:
        """Names (below root), bytes and checksums of the tar files; empty for image files."""
        return self.header.get("shards", [])

    def shard_place(self, number: int) -> str:
        """Its path, or its address."""
        return f"{self.root}/{self.shards[number]['name']}"

    @property
    def raw_channels(self) -> int | None:
        """1 or 3 where samples are pixels, not encoded images."""
        return self.header.get("raw_channels")

    @property
    def own(self) -> list | None:
        """What samples are made of where they are those of a user's own set, packed (own.py)."""
        return self.header.get("own")

    def __len__(self) -> int:
        return len(self.rows)

    def _column(self, name: str) -> np.ndarray:
        if name not in self._columns:
            self._columns[name] = columns.column(self.table, name, self.rows)
        return self._columns[name]

    @cached_property
    def labels(self) -> np.ndarray:
        return self._column("label")

    @cached_property
    def widths(self) -> np.ndarray:
        return self._column("width")

    @cached_property
    def heights(self) -> np.ndarray:
        return self._column("height")

    @cached_property
    def sizes(self) -> np.ndarray:
        return self._column("bytes")

    @cached_property
    def checksums(self) -> np.ndarray:
        return self._column("checksum")

    @cached_property
    def orientations(self) -> np.ndarray | None:
        """None where the manifest was made before they were kept."""
        known = "orientation" in self.table.schema.names and not self.table.column("orientation").null_count
        return self._column("orientation") if known else None

    @cached_property
    def shard_of(self) -> np.ndarray:
        return self._column("shard")

    @cached_property
    def offsets(self) -> np.ndarray:
        return self._column("offset")

    def values(self, name: str) -> np.ndarray:
        """A field's numbers: (N,), or (N, length) where they are lists; or its texts."""
        return self.labels if name == fields.CLASS else self._column(fields.PREFIX + name)

    def of_file(self, name: str, what: str) -> np.ndarray:
        """`bytes`, `checksum` or `offset` of a field that is a file, by sample."""
        return self._column(fields.file_column(self.own_fields[name].kind, name, what))

    def suffix(self, index: int, name: str) -> str:
        """Of the name of such a file."""
        return os.path.splitext(self.file(index, name))[1].lower()

    def of_kind(self, *kinds: str) -> list[str]:
        """Fields that are of one of them."""
        return [name for name, field in self.own_fields.items() if field.kind in kinds]

    @property
    def floats(self) -> list[str]:
        return self.of_kind("float")

    @property
    def files(self) -> list[str]:
        return self.of_kind(*fields.FILES)

    @property
    def boxes(self) -> list[str]:
        return self.of_kind("boxes")

    def more(self, rows: Sequence[int] | np.ndarray) -> pa.Table:
        """Columns of fields alone, of these rows."""
        return fields.columns_of(self.table).take(self.rows.at(np.asarray(rows)))

    def key(self, index: int) -> str:
        """A sample's path below root."""
        stored = self.stored_key(index)
        return unescaped(stored) if self.header.get("escaped") else stored

    def stored_key(self, index: int) -> str:
        """The same as the column has it."""
        return self.table.column("path")[int(self.rows.at(np.int64(index)))].as_py()

    def file(self, index: int, name: str | None = None) -> str:
        """Where one sample (or its file of that name) lies, for people: its absolute path, or its shard's with its own
        behind a colon."""
        key = self.key(index)
        if name is not None:
            column = fields.file_column(self.own_fields[name].kind, name, "path")
            key = self.table.column(column)[int(self.rows.at(np.int64(index)))].as_py()
        if self.shards:
            return f"{self.shard_place(self.shard_of[index])}:{key}"
        return os.path.join(self.root, key)

    @cached_property
    def fingerprint(self) -> str:
        """What the data is, wherever it lies: names, labels, sizes and checksums of all samples."""
        if not self.excluded:
            return self.header["fingerprint"]
        left_out = json.dumps(self.excluded)
        return hashlib.sha256(f"{self.header['fingerprint']} without {left_out}".encode()).hexdigest()

    def check_files(self) -> None:
        """Refuse a manifest whose files are gone or have another size. Looks at all shards, or all files up to
        100,000, else at that many chosen at random; content is `data verify`'s matter."""
        self.check_rows()
        if self.remote:
            problems = elsewhere.differing(str(self.root), self.shards)
        elif self.shards:
            problems = differing((self.shard_place(i), s["bytes"]) for i, s in enumerate(self.shards))
        else:
            chosen = range(len(self))
            if len(self) > FILES_CHECKED_AT_START:
                chosen = random.Random(0).sample(chosen, FILES_CHECKED_AT_START)
            images = ((self.file(i), int(self.sizes[i])) for i in chosen)
            beside = ((self.file(i, n), int(self.of_file(n, "bytes")[i])) for n in self.files for i in chosen)
            problems = differing(chain(images, beside))
        if problems:
            again = "pack or copy them again" if self.shards else f"index again (hpc-lbsgd data index {self.root})"
            where = self.root if self.remote else self.path
            raise RequestError(f"{where} no longer matches its files; {again}:\n{listed(problems)}")

    def check_rows(self) -> None:
        """What a start refuses before it looks at files: labels that no class has, a manifest that was damaged, places
        where no sample can be."""
        self.check_labels()
        self.check_content()  # before a text of it is read
        for some in self.looked_at():
            if (row := sound.misplaced(self, some)) is not None:
                raise RequestError(f"{self.path}: row {row} cannot be where it says; index or pack the data again")

    def looked_at(self, all_of_it: bool = False) -> Iterator[slice]:
        """Rows that a start looks at: all up to 10 million, else stretches; batches are checked as they come."""
        if len(self) <= ROWS_CHECKED_AT_START or all_of_it:
            return columns.slices(len(self))
        starts = np.linspace(0, len(self) - STRETCH, STRETCHES).astype(int).tolist()
        return (slice(first, first + STRETCH) for first in starts)

    def check_content(self, at_any_size: bool = False) -> None:
        """Refuse a manifest that is not what was written: a label, or where a sample lies, may have changed. Above 10
        million rows a start does not read them all."""
        if len(self) > ROWS_CHECKED_AT_START and not at_any_size:
            return
        try:
            whole = self.header.get("digest") in (None, content_digest(self._as_written, self.header))
        except (pa.ArrowException, ValueError) as problem:
            raise RequestError(f"{self.path}: damaged ({problem}); index or pack the data again") from None
        if not whole:
            raise RequestError(
                f"{self.path}: damaged: what is in it is not what was written; index or pack the data again"
            )

    def check_labels(self, all_of_them: bool = False) -> None:
        """Refuse a manifest with labels that no class has."""
        if not self.classes:
            return
        for some in self.looked_at(all_of_them):
            found = self.labels[some]
            wrong = found[(found < 0) | (found >= len(self.classes))]
            if len(wrong):
                raise RequestError(f"{self.path}: a label is {wrong[0]}, and there are {len(self.classes)} classes")


def differing(expected: Iterable[tuple[str, int]]) -> list[str]:
    """What is wrong with files of these (path, bytes)."""
    problems = []
    for path, size in expected:
        try:
            found = os.stat(path).st_size
        except (OSError, ValueError):  # ValueError: no name that a file can have
            problems.append(f"{path}: missing")
            continue
        if found != size:
            problems.append(f"{path}: {found} bytes, the manifest says {size}")
    return problems


def listed(problems: list[str]) -> str:
    lines = [f"  {p}" for p in problems[:NAMED_AT_MOST]]
    if len(problems) > NAMED_AT_MOST:
        lines.append(f"  and {len(problems) - NAMED_AT_MOST} more")
    return "\n".join(lines)


def write(
    out: Path,
    root: Path | str,
    classes: list[str],
    paths: list[str],
    labels: list[int],
    rows: list,
    places: list[tuple[int, int]] | None = None,
    shards: list[dict] | None = None,
    left_out: Mapping[str, int] | None = None,
    more: pa.Table | None = None,
    masks: Mapping[str, list[int]] | None = None,
) -> None:
    """Write a manifest file, whole or not at all. places: (shard, offset) of each sample inside `shards`. left_out: how
    many files were passed over, by what they are. more: columns of fields. masks: classes in them, by name."""
    if not paths:
        raise RequestError(f"{root}: no images are left to be indexed")
    width, height, size, check, orientation = (list(c) for c in zip(*rows, strict=True))
    digest = hashlib.sha256(json.dumps(classes).encode())
    for row in zip(paths, labels, size, check, strict=True):
        digest.update(repr(row).encode(errors="surrogateescape"))
    if more is not None and more.column_names:
        digest.update(content_digest(fields.content_of(more), {}).encode())
    # resolved: a root given through a link stays right when seen from the manifest's real folder
    relative = root if is_url(root) else os.path.relpath(root.resolve(), out.parent.resolve())
    header = {"root": relative, "classes": classes, "fingerprint": digest.hexdigest(), "decoders": decoders()}
    if masks:
        header["masks"] = dict(masks)
    if left_out:
        header["left_out"] = dict(left_out)
    if any(not is_utf8(path) for path in paths):
        header["escaped"], paths = True, [escaped(path) for path in paths]
    values, schema = [paths, labels, width, height, size, check, orientation], SCHEMA
    if places is not None:
        header["shards"] = shards
        values, schema = [*values, *(list(c) for c in zip(*places, strict=True))], PACKED_SCHEMA
    table = with_columns(pa.table(values, schema=schema), more).combine_chunks()
    header["digest"] = content_digest(table, header)
    table = table.replace_schema_metadata({"hpc_lbsgd": json.dumps(header)})
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        os.replace(temporary, out)
    except OSError as problem:
        temporary.unlink(missing_ok=True)
        raise RequestError(
            f"cannot write {out}: {problem.strerror or problem}; choose another place with --out"
        ) from None


def with_columns(table: pa.Table | None, more: pa.Table | None) -> pa.Table:
    if table is None:
        return more
    for name in more.column_names if more is not None else ():
        table = table.append_column(name, more.column(name))
    return table


def subset(source: Manifest, out: Path, count: int, seed: int = 0) -> Manifest:
    """Write a manifest of `count` samples of `source`, chosen at random and kept in its order; files stay in place."""
    return pick(source, out, np.sort(np.random.default_rng(seed).permutation(len(source))[:count]))


def pick(source: Manifest, out: Path, rows: np.ndarray) -> Manifest:
    """Write a manifest of these rows of `source`, in their order; files stay in place."""
    known = source.table.select([name for name in PACKED_SCHEMA.names if name in source.table.column_names])
    found = known.take(source.rows.at(rows)).to_pydict()
    found.setdefault("orientation", [None] * len(rows))
    names = ("width", "height", "bytes", "checksum", "orientation")
    facts = list(zip(*(found[name] for name in names), strict=True))
    places = list(zip(found["shard"], found["offset"], strict=True)) if source.shards else None
    paths = [unescaped(path) for path in found["path"]] if source.header.get("escaped") else found["path"]
    more, masks = source.more(rows), source.header.get("masks")
    write(out, source.root, source.classes, paths, found["label"], facts, places, source.shards, None, more, masks)
    return Manifest(out)

"""A sample's files as an index sees them: its image, and what lies beside it - masks, further images, bytes."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Sequence

import pyarrow as pa

from hpc_lbsgd.data import fields, masks, parts
from hpc_lbsgd.data.decode import decode_all
from hpc_lbsgd.data.manifest import Row, checksum

AT_A_TIME = 32  # images whose bytes a process holds
LARGEST = 2**30  # bytes of a file that is taken as it is: it is read whole
# width, height, bytes, checksum, and of an image its orientation, of a mask the classes in it, of bytes 0
Seen = tuple[int, int, int, int, object]


def looked_at(kind: str, contents: Iterable[bytes | str]) -> list[Seen | str]:
    """What each file's content is, or what is wrong with it; what is wrong already stays."""
    if kind == fields.IMAGE:
        return rows_of(list(contents))
    return [content if isinstance(content, str) else _one(kind, content) for content in contents]


def _one(kind: str, content: bytes) -> Seen | str:
    width = height = 0
    more: object = 0
    if kind == "mask":
        try:
            width, height, more = masks.look(content)
        except ValueError as problem:
            return str(problem)
    return width, height, len(content), checksum(content), more


def rows_of(contents: Sequence[bytes | str]) -> list[Row | str]:
    """The row of each image, or what is wrong with it. Every one is decoded to its last row: a truncated file is found
    here and not at hour three."""
    there = [i for i, content in enumerate(contents) if isinstance(content, bytes)]
    rows: list = list(contents)
    for i, facts in zip(there, decode_all([contents[i] for i in there]), strict=True):
        if isinstance(facts, str):
            rows[i] = facts
        else:
            rows[i] = (facts.width, facts.height, len(contents[i]), checksum(contents[i]), facts.orientation)
    return rows


def examine(root: str, paths: list[str], kind: str) -> list[Seen | str]:
    """Of each file below a folder."""
    found: list[Seen | str] = []
    for start in range(0, len(paths), AT_A_TIME):
        some = (os.path.join(root, path) for path in paths[start : start + AT_A_TIME])
        found += looked_at(kind, map(content_of, some))
    return found


def content_of(path: str) -> bytes | str:
    try:
        there = os.stat(path)
        if not stat.S_ISREG(there.st_mode):  # a pipe would be waited for, a device may never end
            return "is not a regular file"
        if there.st_size > LARGEST:
            return too_large(there.st_size)
        with open(path, "rb") as file:
            return file.read()
    except OSError as problem:
        return parts.Unread(problem)


def too_large(size: int) -> str:
    return f"has {size} bytes, and a sample's files are read whole: {LARGEST} are allowed"


def identities(root: str, paths: list[str], kind: str) -> list:
    return [kind, [(path, parts.identity_of(os.path.join(root, path))) for path in paths]]


def examine_in_tar(path: str, places: list[tuple[int, int]], kind: str) -> list[Seen | str]:
    """Of each (offset, bytes) of a tar."""
    found: list[Seen | str] = []
    with open(path, "rb") as file:

        def content(offset: int, size: int) -> bytes | str:
            if size > LARGEST:
                return too_large(size)
            file.seek(offset)
            return file.read(size)  # to its end, where a network file system gives a part

        for start in range(0, len(places), AT_A_TIME):
            found += looked_at(kind, (content(*place) for place in places[start : start + AT_A_TIME]))
    return found


def identities_in_tar(path: str, places: list[tuple[int, int]], kind: str) -> list:
    return [kind, path, parts.identity_of(path), places]


def beside(kind: str, name: str, image: Row | str, seen: Seen | str) -> Row | str:
    """An image's row, or what is wrong with it or a file beside it: one window is cut of both."""
    if isinstance(image, str):
        return image
    if isinstance(seen, str):
        return f"{name}: {seen}"
    if kind != "bytes" and image[:2] != seen[:2]:
        return f"{name} is {seen[0]}x{seen[1]}, and the image {image[0]}x{image[1]}, as they are stored"
    if kind == fields.IMAGE and seen[4] != image[4]:
        return f"{name} has EXIF's orientation {seen[4]}, and the image {image[4]}"
    return image


def table_of(
    kind: str, name: str, paths: Sequence[str], found: Sequence[Seen], offsets: Sequence[int] | None = None
) -> tuple[pa.Table, list[int]]:
    """(the columns of a manifest, classes in all of them where they are masks). offsets: inside tar files."""
    columns = {
        "path": pa.array(paths, pa.large_string()),
        "bytes": pa.array([seen[2] for seen in found], pa.int64()),
        "checksum": pa.array([seen[3] for seen in found], pa.uint64()),
    }
    if offsets is not None:
        columns["offset"] = pa.array(offsets, pa.int64())
    classes = sorted(set().union(*(seen[4] for seen in found))) if kind == "mask" else []
    return pa.table({fields.file_column(kind, name, what): column for what, column in columns.items()}), classes


def placed(more: pa.Table, places: dict[tuple[str, str], list[tuple[int, int, int]]]) -> pa.Table:
    """Columns of fields, with other (bytes, checksum, offset) of files, by (kind, name) and sample."""
    for (kind, name), found in places.items():
        for what, values in zip(("bytes", "checksum", "offset"), zip(*found, strict=True), strict=True):
            title = fields.file_column(kind, name, what)
            column = pa.array(values, pa.uint64() if what == "checksum" else pa.int64())
            if title in more.column_names:
                more = more.set_column(more.column_names.index(title), title, column)
            else:
                more = more.append_column(title, column)
    return more

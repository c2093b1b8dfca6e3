"""Work on a set that is kept piece by piece, so that it goes on after a kill and is shared by many nodes.

    .manifest.arrow.parts/DIGEST.json   beside a manifest that is being made: the rows of one piece of work

A piece is known by what it was made of: names, sizes and times of its files, and the decoders that were asked. What
changed meanwhile has another digest, and is looked at anew. The folder goes when the manifest is there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from hpc_lbsgd.data.decode import decoders
from hpc_lbsgd.data.pool import in_order
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.records import write_atomically

VERSION = 2  # of what rows mean; another one makes all pieces stale


class Unread(str):
    """What is wrong with a file that could not be read: with the storage, perhaps, and not with the file."""


class Share(NamedTuple):
    """One of `count` parts of some work, numbered from 0."""

    number: int
    count: int

    def of(self, work: Sequence) -> Sequence:
        return work[self.number :: self.count]

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


ALL = Share(0, 1)


class Work(NamedTuple):
    """function(*arguments) makes a list of rows; identity(*arguments) says of what files, as they are now."""

    function: Callable[..., list]
    identity: Callable[..., list]
    arguments: tuple
    items: int


def folder_of(out: Path) -> Path:
    return out.with_name(f".{out.name}.parts")


def identity_of(path: str | os.PathLike) -> list[int] | None:
    """Another one after any change of a file; None where it cannot be looked at."""
    try:
        there = os.stat(path)
    except OSError:
        return None
    return [there.st_size, there.st_mtime_ns, there.st_ctime_ns]


def rows(out: Path, work: list[Work], title: str, processes: int | None, share: Share = ALL) -> list[list]:
    """The rows of each piece of a share of the work, done before or now. Raises RequestError where they cannot be kept
    beside `out`."""
    folder, mine = folder_of(out), share.of(work)
    try:
        folder.mkdir(exist_ok=True)  # the folder of a mistyped name is not made
    except OSError as problem:
        raise unwritable(out, problem) from None
    jobs = [(kept, str(folder), piece.function, piece.identity, piece.arguments) for piece in mine]
    try:
        return list(in_order(jobs, sum(piece.items for piece in mine), title, processes))
    except OSError as problem:
        raise unwritable(out, problem) from None


def kept(folder: str, function: Callable, identity: Callable, arguments: tuple) -> list:
    """A piece's rows, from its file or made now, and kept."""
    about = [VERSION, decoders(), function.__module__, identity(*arguments)]
    path = Path(folder, hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32] + ".json")
    try:
        return [row if isinstance(row, str) else tuple(row) for row in json.loads(path.read_bytes())]
    except (OSError, ValueError):
        made = function(*arguments)
    if any(isinstance(row, Unread) for row in made):
        return made  # looked at again when it is asked for again
    with contextlib.suppress(FileNotFoundError):  # another process has ended the same work, and removed the folder
        write_atomically(path, json.dumps(made))
    return made


def remove(out: Path) -> None:
    shutil.rmtree(folder_of(out), ignore_errors=True)


def unwritable(out: Path, problem: OSError) -> RequestError:
    return RequestError(f"cannot write {out}: {problem.strerror or problem}; choose another place with --out")

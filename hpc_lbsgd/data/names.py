"""Names of files, which may have any bytes: as Arrow's UTF-8, as a line of text, and in the lists that take rows away
from manifests.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from hpc_lbsgd.records import write_atomically

FILE_NAME = "manifest.arrow"
EXCLUDE = "exclude.txt"  # one path a line; what follows a tab is the reason
MARK = "\ufeff".encode()  # that some editors begin a file with


def is_utf8(name: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in name)


def escaped(name: str) -> str:
    return os.fsencode(name.replace("\\", "\\\\")).decode("utf-8", "backslashreplace")


def unescaped(stored: str) -> str:
    """What `escaped` was given."""
    parts = re.sub(rb"\\(\\|x[0-9a-f]{2})", lambda m: b"\\" if m[1] == b"\\" else bytes.fromhex(m[1][1:].decode()),
                   stored.encode())  # fmt: skip
    return os.fsdecode(parts)


def lists_of(manifest: Path) -> list[Path]:
    """Where rows of a manifest may be taken away: `exclude.txt`, which is of all manifests beside it, and for those of
    other names than a folder's own NAME.exclude.txt, which is of NAME.arrow alone. The last is what is added to."""
    own = [] if manifest.name == FILE_NAME else [manifest.with_name(f"{manifest.stem}.{EXCLUDE}")]
    return [manifest.with_name(EXCLUDE), *own]


def together(lists: Iterable[Path]) -> bytes:
    """What they hold, as one."""
    return b"\n".join(path.read_bytes().removeprefix(MARK) for path in lists if path.exists())


def read_excluded(lists: Iterable[Path]) -> set[str]:
    """The paths that they name; none where they are not there."""
    lines = re.split("\r\n?|\n", together(lists).decode("utf-8", "surrogateescape"))  # whatever an editor ends them by
    return {unquoted(line) for line in lines if line.strip()}


def said_of(lists: Iterable[Path]) -> str:
    """Why images are not in a set."""
    return f"images that {' or '.join(path.name for path in lists if path.exists())} names"


def add_excluded(path: Path, found: Iterable[tuple[str, str]]) -> Path:
    """Add (path, reason) to a list: manifests that it is of leave those rows out from now on."""
    before = path.read_text("utf-8", "surrogateescape") if path.exists() else ""
    if before and not before.endswith("\n"):  # as some editors leave a file: the next name would be glued to the last
        before += "\n"
    known = read_excluded([path])
    new = [f"{quoted(name)}\t{' '.join(reason.split())}\n" for name, reason in found if name not in known]
    write_atomically(path, (before + "".join(new)).encode("utf-8", "surrogateescape"))
    return path


def quoted(name: str) -> str:
    """A name on a line of its own: as JSON has it where it would break the line."""
    return json.dumps(name) if name.startswith('"') or any(c in name for c in "\n\r\t") else name


def unquoted(line: str) -> str:
    if line.startswith('"'):
        with suppress(ValueError):  # else it is a name of somebody's own hand
            name, end = json.JSONDecoder().raw_decode(line)
            if line[end:].rstrip("\r")[:1] in ("", "\t"):
                return name
    return line.split("\t")[0].rstrip("\r")

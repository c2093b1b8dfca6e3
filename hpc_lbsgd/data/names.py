"""Names of files, which may have any bytes: as Arrow's UTF-8, as a line of text, and in exclude.txt, which takes rows
away from the manifests beside it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from hpc_lbsgd.records import write_atomically

EXCLUDE = "exclude.txt"  # one path a line; what follows a tab is the reason


def is_utf8(name: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in name)


def escaped(name: str) -> str:
    return os.fsencode(name.replace("\\", "\\\\")).decode("utf-8", "backslashreplace")


def unescaped(stored: str) -> str:
    """What `escaped` was given."""
    parts = re.sub(rb"\\(\\|x[0-9a-f]{2})", lambda m: b"\\" if m[1] == b"\\" else bytes.fromhex(m[1][1:].decode()),
                   stored.encode())  # fmt: skip
    return os.fsdecode(parts)


def read_excluded(folder: Path) -> set[str]:
    """Paths that `exclude.txt` in a folder names; none where it is not there."""
    try:
        lines = (folder / EXCLUDE).read_text("utf-8-sig", "surrogateescape").split("\n")
    except FileNotFoundError:
        return set()
    return {unquoted(line) for line in lines if line.strip()}


def add_excluded(folder: Path, found: Iterable[tuple[str, str]]) -> Path:
    """Add (path, reason) to `exclude.txt`: manifests beside it leave those rows out from now on."""
    path = folder / EXCLUDE
    before = path.read_text("utf-8", "surrogateescape") if path.exists() else ""
    if before and not before.endswith("\n"):  # as some editors leave a file: the next name would be glued to the last
        before += "\n"
    known = read_excluded(folder)
    new = [f"{quoted(name)}\t{' '.join(reason.split())}\n" for name, reason in found if name not in known]
    write_atomically(path, (before + "".join(new)).encode("utf-8", "surrogateescape"))
    return path


def quoted(name: str) -> str:
    """A name on a line of its own: as JSON has it where it would break the line."""
    return json.dumps(name) if name.startswith('"') or any(c in name for c in "\n\r\t") else name


def unquoted(line: str) -> str:
    if not line.startswith('"'):
        return line.split("\t")[0].rstrip("\r")
    try:
        return json.JSONDecoder().raw_decode(line)[0]
    except ValueError:
        return line.split("\t")[0]

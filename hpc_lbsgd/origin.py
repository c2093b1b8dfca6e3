"""Where a file of figures comes from: the command that made it, and which program that was."""

from __future__ import annotations

import hashlib
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

PROGRAM = Path(__file__).parent


def commit() -> str | None:
    """The program's own, with -dirty where files differ from it; None where it is no checkout, and none was packed
    (cluster/bundle.py)."""
    packed = Path(sys.prefix) / "bundle.json"
    if packed.is_file() and PROGRAM.is_relative_to(sys.prefix):
        return json.loads(packed.read_text())["commit"]
    line = ["git", "-C", str(PROGRAM), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(line, capture_output=True, text=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


@cache
def program() -> str:
    """A digest of this package's source."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted((*PROGRAM.rglob("*.py"), *PROGRAM.rglob("*.c"))):
        digest.update(f"{path.relative_to(PROGRAM)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def origin() -> dict[str, str | None]:
    """{command, commit} of this process, for the result that it writes."""
    return {"command": shlex.join(["hpc-lbsgd", *sys.argv[1:]]), "commit": commit()}


def said(result: Mapping) -> str:
    """A line under a plot."""
    return f"{result['command']}  ·  commit {result['commit'] or 'unknown'}" if result.get("command") else ""

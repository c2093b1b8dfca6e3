"""Where a file of figures comes from: the command that made it and the commit of this program."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


def commit() -> str | None:
    """The program's own, with -dirty where files differ from it; None where it is no checkout."""
    line = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(line, capture_output=True, text=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def origin() -> dict[str, str | None]:
    """{command, commit} of this process, for the result that it writes."""
    return {"command": shlex.join(["hpc-lbsgd", *sys.argv[1:]]), "commit": commit()}


def said(result: Mapping) -> str:
    """A line under a plot."""
    return f"{result['command']}  ·  commit {result['commit'] or 'unknown'}" if result.get("command") else ""

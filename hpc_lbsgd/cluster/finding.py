"""One line of what `doctor` says, and whom it asks."""

from __future__ import annotations

import subprocess
from importlib import metadata
from typing import NamedTuple

OK, WARN, FAIL = "ok", "warn", "fail"


class Finding(NamedTuple):
    level: str  # ok | warn | fail
    what: str
    found: str
    fix: str = ""


def output_of(*command: str, timeout_s: float = 20) -> str | None:
    """What a command prints; None where it is not there or fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None

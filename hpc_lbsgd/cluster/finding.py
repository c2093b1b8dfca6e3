"""One line of what `doctor` says, and whom it asks."""

from __future__ import annotations

from importlib import metadata
from typing import NamedTuple

from hpc_lbsgd.schedulers.scheduler import ask

OK, WARN, FAIL = "ok", "warn", "fail"


class Finding(NamedTuple):
    level: str  # ok | warn | fail
    what: str
    found: str
    fix: str = ""


def output_of(*command: str, timeout_s: float = 20) -> str | None:
    """What a command prints; None where it is not there or fails."""
    found = ask(*command, timeout_s=timeout_s)
    return found.stdout.strip() if found and found.returncode == 0 else None


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None

"""One line of what `doctor` says."""

from __future__ import annotations

from typing import NamedTuple

OK, WARN, FAIL = "ok", "warn", "fail"


class Finding(NamedTuple):
    level: str  # ok | warn | fail
    what: str
    found: str
    fix: str = ""

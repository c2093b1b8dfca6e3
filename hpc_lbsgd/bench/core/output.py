"""A result as JSON or for a person, and drawn."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from shutil import get_terminal_size

from hpc_lbsgd.bench.core.fit import fit
from hpc_lbsgd.origin import origin


def give(
    result: dict,
    show: Callable[[dict], str],
    as_json: bool,
    picture: Path | None = None,
    plot: Callable[[Path, dict], None] | None = None,
) -> None:
    """Print a result as one JSON object or as `show` says it, on a terminal as wide as that is; draw it where a file is
    named."""
    if "rows" in result:
        result = origin() | result
    text = json.dumps(finite(result)) if as_json else show(result)
    print(fit(text, get_terminal_size().columns) if sys.stdout.isatty() and not as_json else text)
    if picture and plot:
        plot(picture, result)


def finite(value):
    """JSON knows no infinity: None in its place."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and value in (float("inf"), float("-inf")) else value

"""Functions that a recipe names: package.module:function."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable

from hpc_lbsgd.errors import RequestError


def load(name: str, key: str) -> Callable:
    """The function; `key` is the recipe key that names it, for the message where it is not there."""
    module, function = name.split(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a console script's path does not have it
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as problem:  # whatever a module does when it is imported
        kind = "" if isinstance(problem, (ImportError, AttributeError)) else f"{type(problem).__name__}: "
        raise RequestError(f"{key} = {name}: {kind}{problem}{place_of(problem)}") from None
    if not callable(found):
        raise RequestError(f"{key} = {name}: {type(found).__name__}, not a function")
    return found


def place_of(problem: BaseException) -> str:
    """Where in its author's code something went wrong: " (file:line, code)"; torch's own lines are passed over."""
    if isinstance(problem, SyntaxError):
        return ""  # says it itself
    others = (os.path.dirname(__file__) + os.sep, "/torch/", "importlib")
    own = [f for f in traceback.extract_tb(problem.__traceback__) if not any(part in f.filename for part in others)]
    return f" ({own[-1].filename}:{own[-1].lineno}, {own[-1].line})" if own else ""

"""Functions that a recipe names: package.module:function."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable

from hpc_lbsgd.errors import RequestError


def load(name: str, key: str) -> Callable:
    """The function; `key` is the recipe key that names it, for the message where it is not there."""
    module, function = name.split(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a console script's path does not have it
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as problem:
        raise RequestError(f"{key} = {name}: {problem}") from None

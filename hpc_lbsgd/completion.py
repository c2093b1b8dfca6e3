"""What a shell offers at TAB: commands and flags (argcomplete knows them from the parser), shipped recipes, and the
keys of --set."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator

from hpc_lbsgd.errors import RequestError

SHELLS = ("bash", "zsh", "fish")
ASKED = "_ARGCOMPLETE"  # by a shell at TAB


def script(shell: str) -> str:
    """What a shell has to read once."""
    return argcomplete().shellcode(["hpc-lbsgd"], shell=shell)


def answer(parser: argparse.ArgumentParser) -> None:
    """Where a shell asks what may come next, tell it, and end."""
    if ASKED in os.environ:
        for action in actions(parser):
            if action.dest == "recipe":
                action.completer = recipes
            elif action.dest == "settings":
                action.completer = keys
        argcomplete().autocomplete(parser)


def argcomplete():
    try:
        import argcomplete
    except ImportError:
        raise RequestError("completion: argcomplete is not installed here (pip install argcomplete)") from None
    return argcomplete


def actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from actions(command)
        else:
            yield action


def recipes(prefix: str, **_) -> list[str]:
    from hpc_lbsgd import reading  # brings pydantic and YAML

    return [*reading.shipped(), *argcomplete().completers.FilesCompleter()(prefix)]


def keys(**_) -> list[str]:
    from hpc_lbsgd.recipe import Recipe

    found = []
    for name, field in Recipe.model_fields.items():
        inside = getattr(field.annotation, "model_fields", None)
        found += [f"{name}.{key}=" for key in inside] if inside else [f"{name}="]
    return found

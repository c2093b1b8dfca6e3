#!/usr/bin/env python3
"""Print docs/recipe.md: every recipe key with its type, default and meaning, from the code.

python tools/recipe_reference.py > docs/recipe.md      (a test compares the two)
"""

from __future__ import annotations

import re
import textwrap
import typing

from pydantic import BaseModel

from hpc_lbsgd import amend, recipe

HEAD = """# Recipe reference

A recipe is a YAML file. The *result part* decides the weights and is fingerprinted: everything but `machine`,
`checkpoint`, `train.max_steps`, `preflight`, `eval_epochs`, `metrics`, `callbacks` and `loggers`, and the paths of data
(what the data holds is fingerprinted apart).
{bits}

A resume with another result part is refused. {amendable}

An unknown key or an impossible value is refused before any rank starts work. `--set section.key=value` changes a key on
the command line.

Plain words are those of YAML 1.2: only `true` and `false` are booleans (`off`, `on`, `yes` and `no` are words), `1e-4`
is a number, `0o17` an octal one, `1:30` and `2024-01-01` are words. A key that is twice there is refused, and so are
anchors, aliases and tags. A boolean is no number, nor is text in quotes; an int will do where a float is wanted.

`machine: FILE` takes the section from a file that holds nothing else, such as `bench step --tune` writes;
`--set machine=FILE` puts such a file's keys over those of any recipe.
"""


def head() -> str:
    """HEAD with what the code has lists of."""
    bits = "; ".join(f"with `{kind}`, {named(keys)}" for kind, keys in recipe.BIT_KEYS.items() if keys)
    return HEAD.format(
        bits=wrapped(f"Where bits are promised, those keys of `machine` belong to it that change bits: {bits}."),
        amendable=wrapped(
            f"With `--resume`, `--amend KEY=VALUE` changes these from there on: {named(amend.AMENDABLE)}.",
            len("A resume with another result part is refused. "),
        ),
    )


def named(keys) -> str:
    return ", ".join(f"`{key}`" for key in keys)


def wrapped(text: str, before: int = 0) -> str:
    """Lines as long as the manual's; the first has `before` characters already."""
    return textwrap.fill("x" * before + text, 120, break_long_words=False, break_on_hyphens=False)[before:]


def type_of(annotation: object) -> str:
    """A type as a person would write it: int, float, a choice of words, a list."""
    if typing.get_origin(annotation) is typing.Annotated:
        return type_of(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) is typing.Literal:
        return ", ".join(f"`{a}`" for a in typing.get_args(annotation))
    arguments = [a for a in typing.get_args(annotation) if a is not type(None)]
    if typing.get_origin(annotation) is dict:
        return "keys and values"
    if typing.get_origin(annotation) in (list, tuple):
        return f"list of {type_of(arguments[0])}"
    if arguments:
        return " or ".join(dict.fromkeys(type_of(a) for a in arguments))
    return getattr(annotation, "__name__", str(annotation))


def limits(field) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    found = dict.fromkeys(re.findall(r"\b(ge|gt|le|lt)=([\d.e+-]+)", repr(field)))
    return " and ".join(f"{signs[k]} {v}" for k, v in found)


def default(value: object) -> str:
    if value is None:
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def section(model: type[BaseModel], prefix: str) -> list[str]:
    rows = ["| key | is | default | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            continue
        what = " ".join(p for p in (type_of(kind), limits(field)) if p)
        rows.append(f"| `{prefix}{name}` | {what} | {default(field.default)} | {(field.description or '').strip()} |")
    return rows


def reference() -> str:
    lines = [head(), *section(recipe.Recipe, "")]
    for name, field in recipe.Recipe.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            lines += ["", f"## {name}", "", *section(field.annotation, f"{name}.")]
    return "\n".join(re.sub(r"\s*\n\s*", " ", line) if line.startswith("|") else line for line in lines) + "\n"


if __name__ == "__main__":
    print(reference(), end="")

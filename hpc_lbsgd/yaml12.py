"""YAML files of people: recipes, machine files, sites, `--set` values.

Plain words are those of YAML 1.2's core schema: `determinism: off` is a word, `1e-4` a number, `2:00:00` a word. PyYAML
parses (1.1 and 1.2 hardly differ in syntax) and is told what a word is. What could surprise is refused by line: a key
that is twice there; anchors, aliases and tags, which no recipe needs and which can grow without end.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any, ClassVar

import yaml

from hpc_lbsgd.errors import RequestError

TAG = "tag:yaml.org,2002:"
DIGITS = 4000  # Python converts no more to an integer (sys.get_int_max_str_digits)
# YAML 1.2.2, section 10.3.2: the tag, how its plain words look, and what they may start with
CORE = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)


class Refused(yaml.MarkedYAMLError):
    """YAML, but nothing that these files may say."""


class Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[Any, Any] = {}
    yaml_constructors: ClassVar[dict[str | None, Any]] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]  # PyYAML has no types here
        if isinstance(event, yaml.AliasEvent) or event.anchor or event.tag:
            what = "anchors, aliases and tags (&, *, !) are not read; write the value out, or in quotes"
            raise Refused(problem=what, problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.tag != TAG + "str":
                what = f"key {key.value}: " if isinstance(key, yaml.ScalarNode) else ""
                raise Refused(problem=f"{what}a key is a word", problem_mark=key.start_mark)
            if key.value in lines:
                what = f"key {key.value} is there twice, first in line {lines[key.value]}"
                raise Refused(problem=what, problem_mark=key.start_mark)
            lines[key.value] = line
        return {key.value: self.construct_object(value, deep=True) for key, value in node.value}

    def construct_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > DIGITS:
            raise Refused(problem=f"a number of {len(node.value)} digits", problem_mark=node.start_mark)
        return int(node.value, {"0o": 8, "0x": 16}.get(node.value[:2], 10))

    def construct_float(self, node: yaml.ScalarNode) -> float:
        return float(re.sub(r"\.(?=inf|nan)", "", node.value.lower()))


class Dumper(yaml.SafeDumper):
    """Quotes what is no word in YAML 1.1 or in 1.2, so that either kind of reader finds what was written."""


for name, pattern, starts in CORE:
    for side in (Loader, Dumper):  # Dumper: beside 1.1's
        side.add_implicit_resolver(TAG + name, re.compile(f"^(?:{pattern})$"), starts)
Dumper.add_implicit_resolver(TAG + "bool", re.compile("^[yYnN]$"), list("yYnN"))  # 1.1 has them, PyYAML has not
for name, construct in (
    ("null", lambda loader, node: None),
    ("bool", lambda loader, node: node.value.lower() == "true"),
    ("int", Loader.construct_int),
    ("float", Loader.construct_float),
    ("str", Loader.construct_yaml_str),
    ("seq", Loader.construct_yaml_seq),
    ("map", Loader.construct_yaml_map),
):
    Loader.add_constructor(TAG + name, construct)


def parse(text: str, where: str) -> Any:
    """The value of a YAML text. Raises RequestError with one sentence that says where, and in which line."""
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as problem:
        kind = "" if isinstance(problem, Refused) else "not YAML: "
        raise RequestError(f"{where}: {kind}{sentence(problem)}") from None
    except RecursionError:
        raise RequestError(f"{where}: nested too deep") from None


def sentence(problem: yaml.YAMLError) -> str:
    if not isinstance(problem, yaml.MarkedYAMLError):
        return " ".join(str(problem).split())
    mark = problem.problem_mark or problem.context_mark
    said = ", ".join(part for part in (problem.context, problem.problem) if part)
    return f"line {mark.line + 1}: {said}" if mark else said


def mapping(text: str, where: str) -> dict[str, Any]:
    """The keys and values of a YAML text."""
    content = parse(text, where)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise RequestError(f"{where}: expected keys and values, found {type(content).__name__}")
    return content


def mapping_of(path: Path, where: str) -> dict[str, Any]:
    """The keys and values of a file."""
    if not path.is_file():
        raise RequestError(f"{where}: {'a folder, not a file' if path.is_dir() else 'no such file'}")
    try:
        return mapping(path.read_text(encoding="utf-8"), where)
    except UnicodeDecodeError:
        raise RequestError(f"{where}: no text (not UTF-8)") from None
    except OSError as problem:
        raise RequestError(f"{where}: cannot be read: {problem.strerror}") from None


def dump(content: dict[str, Any]) -> str:
    return yaml.dump(content, Dumper=Dumper, sort_keys=False)

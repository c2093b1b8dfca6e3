"""From what a person wrote to a checked description: recipes by name or path, `--set`, and what is said about a wrong
key. Sites are checked the same way."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from hpc_lbsgd import yaml12
from hpc_lbsgd.errors import RequestError, did_you_mean

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

M = TypeVar("M", bound=BaseModel)
# what a person calls the patterns of words that name code
PATTERNS = {r"^[\w.]+:\w+$": "package.module:function", r"^\w+$": "a class of torch.optim"}
ALLOWED = {"bool_type": "; allowed: true, false", "string_type": "; put it in quotes"}  # by pydantic's kind of error


def names_in(folder: Traversable) -> list[str]:
    """Names of the YAML files in a folder of the package."""
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))


def shipped() -> list[str]:
    """Names of the recipes that come with the package."""
    return names_in(resources.files("hpc_lbsgd.recipes"))


def heading(name: str) -> str:
    """What a shipped recipe's first line says of it."""
    lines = (resources.files("hpc_lbsgd.recipes") / f"{name}.yaml").read_text("utf-8").splitlines()
    return lines[0].lstrip("# ").rstrip(".:")


def recipe_content(name: str, settings: Iterable[str] = ()) -> dict[str, Any]:
    """Keys and values of a recipe by shipped name or path, machine files and settings in place; not yet checked."""
    path = Path(name)
    where = f"recipe {name}"
    of_ours = name in shipped()
    if path.suffix in (".yaml", ".yml") or (path.exists() and not (of_ours and path.is_dir())):
        content = yaml12.mapping_of(path, where)
        if not content:
            raise RequestError(f"{where}: empty; `hpc-lbsgd init DIR` writes a first one")
    elif of_ours:
        content = yaml12.mapping((resources.files("hpc_lbsgd.recipes") / f"{name}.yaml").read_text("utf-8"), where)
    else:
        near = did_you_mean(name, shipped())
        raise RequestError(f"recipe {name!r}: neither a file nor a shipped recipe ({', '.join(shipped())}){near}")
    if isinstance(content.get("machine"), str):
        content["machine"] = machine_file(content["machine"])
    for setting in settings:
        override(content, setting)
    return content


def machine_file(name: str) -> dict[str, Any]:
    """The machine section of a file that holds nothing else, so that including it cannot change a result."""
    content = yaml12.mapping_of(Path(name), f"machine = {name}")
    section = content.get("machine") or {}
    if content.keys() != {"machine"} or not isinstance(section, dict):
        raise RequestError(f"machine = {name}: expected one section, machine; found {', '.join(content) or 'nothing'}")
    return section


def override(content: dict[str, Any], setting: str) -> None:
    """Apply one `--set a.b=value` (the value is YAML), or `--set machine=FILE`, to a recipe's content."""
    key, equals, value = setting.partition("=")
    if not equals or not key:
        raise RequestError(f"--set {setting}: expected key=value, such as optim.base_lr=0.2")
    if key.strip() == "machine":
        own = content.get("machine")
        content["machine"] = (own if isinstance(own, dict) else {}) | machine_file(value)
        return
    *sections, last = key.strip().split(".")
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise RequestError(f"--set {setting}: {section} is a value, not a section")
    content[last] = yaml12.parse(value, f"--set {setting}")


def flatten(part: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"section.key": value} of a nested one: keys as `--set` names them."""
    flat: dict[str, Any] = {}
    for key, value in part.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def validated(model: type[M], content: dict[str, Any], where: str) -> M:
    """The description that `content` gives. Raises RequestError with a line a wrong key."""
    try:
        return model.model_validate(content)
    except ValidationError as problem:
        raise RequestError("\n".join(f"{where}: {line}" for line in explain(problem.errors(), model))) from None


def explain(errors: list[ErrorDetails], model: type[BaseModel]) -> list[str]:
    """One sentence a wrong key: the key, the value, and what is allowed."""
    sentences: dict[str, str] = {}
    for error in errors:
        if error["type"] == "string_pattern_mismatch" and error["ctx"]["pattern"] in PATTERNS:
            error["msg"] = f"Input should be {PATTERNS[error['ctx']['pattern']]}"
        # pydantic reports the alternatives of `INT | per_rank` apart; the key is what the user typed, whatever it is
        unknown = error["type"] == "extra_forbidden"
        typed = len(error["loc"]) - 1 if unknown else None
        alternative = re.compile(r"(int|float|str)$|constrained-|.*\[")
        location = [str(p) for i, p in enumerate(error["loc"]) if i == typed or not alternative.match(str(p))]
        key = ".".join(location)
        if unknown:
            section = model
            for part in location[:-1]:
                found: Any = section.model_fields[part].annotation
                section = next((t for t in get_args(found) if t is not type(None)), found)  # X of `X | None`
            sentences[key] = (
                f"unknown key {key} (= {error['input']!r}); allowed here: {', '.join(section.model_fields)}"
                + did_you_mean(location[-1], section.model_fields)
            )
        elif error["type"] == "value_error":
            sentences[f"{key} {error['msg']}"] = str(error["ctx"]["error"])
        elif key in sentences:
            sentences[key] += f", or {error['msg'].lower()}"
        else:
            said = error["msg"][0].lower() + error["msg"][1:] + ALLOWED.get(error["type"], "")
            sentences[key] = f"{key} = {error['input']!r}: {said}"
    return list(sentences.values())

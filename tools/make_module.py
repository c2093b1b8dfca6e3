"""Writes modulefiles for an environment, from the templates in modules/: `make module PREFIX=/apps/modulefiles`.

PREFIX/lmod/hpc_lbsgd/VERSION.lua     module use PREFIX/lmod      (Lmod)
PREFIX/tcl/hpc_lbsgd/VERSION          module use PREFIX/tcl       (Environment Modules)
"""

from __future__ import annotations

import argparse
import configparser
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def lua(text: str) -> str:
    """A Lua string: every byte that is not plain is written as a number."""
    plain = re.compile(rb"[A-Za-z0-9 /._+-]")
    return '"' + "".join(chr(b) if plain.match(bytes([b])) else f"\\{b:03d}" for b in text.encode()) + '"'


def tcl(text: str) -> str:
    """A Tcl word: a backslash before whatever Tcl would read."""
    return '"' + re.sub(r'([\\"$\[\]{};])', r"\\\1", text) + '"'


def fill(template: str, version: str, environment: Path, prerequisites: list[str], conflicts: list[str]) -> str:
    """The modulefile's text. template: lua | tcl."""
    if template == "lua":
        quote, prereq, conflict = lua, "depends_on({})", "conflict({})"
    else:
        quote, prereq, conflict = tcl, "prereq {}", "conflict {}"
    text = (ROOT / "modules" / f"hpc_lbsgd.{template}").read_text()
    parts = {
        # one line each: several on one line would mean "any of them" in Tcl
        "@CONFLICTS@\n": "".join(conflict.format(quote(c)) + "\n" for c in conflicts),
        "@PREREQUISITES@\n": "".join(prereq.format(quote(p)) + "\n" for p in prerequisites),
        "@ENVIRONMENT@": quote(str(environment)),
        "@VERSION@": version,
    }
    return re.sub("|".join(parts), lambda found: parts[found.group()], text)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("prefix", help="folder of modulefiles")
    p.add_argument("--environment", type=Path, default=ROOT / ".venv", help="what the module puts on PATH")
    p.add_argument("--prereq", default="", help="modules that are loaded with it, separated by spaces")
    p.add_argument("--conflict", default="", help="modules that must not be loaded")
    args = p.parse_args()
    environment = args.environment.absolute()
    if not args.prefix:
        print("PREFIX is not set: make module PREFIX=/apps/modulefiles", file=sys.stderr)
        return 2
    if not (environment / "bin" / "hpc-lbsgd").exists():
        print(f"{environment}: no hpc-lbsgd in it; make setup first", file=sys.stderr)
        return 2
    if "\n" in str(environment) or ":" in str(environment):
        print(f"{str(environment)!r}: PATH cannot hold it", file=sys.stderr)
        return 2
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    version = config["metadata"]["version"]
    for kind, template, name in (("lmod", "lua", f"{version}.lua"), ("tcl", "tcl", version)):
        path = Path(args.prefix) / kind / "hpc_lbsgd" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(fill(template, version, environment, args.prereq.split(), args.conflict.split()))
        print(f"{path}    (module use {Path(args.prefix).absolute() / kind}; module load hpc_lbsgd)")
    return 0


if __name__ == "__main__":
    sys.exit(main())

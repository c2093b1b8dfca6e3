"""The manual's pages as a reader takes them: their blocks, and their commands as a shell has them after its work."""

import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = {"sh", "python", "yaml", "json", "text"}  # of fenced blocks; an indented one is sh
IN_TEXT = {"hpc-lbsgd", "make", "python", "pip", "module", "torchrun", "mpirun", "srun", "salloc", "aprun", "touch"}
MESSAGE = ": "  # what a program says begins with a program's name, too

# A shell that can start nothing: it writes down what it is asked for, and the line where.
SHELL = r"""exec 9>>asked; set -u; PATH=/nowhere
for b in $(compgen -b); do case $b in printf|local|set|eval|export|enable) ;; *) enable -n "$b" ;; esac; done
command_not_found_handle() { local IFS=$'\x1f'; printf '%s\x1e' "${BASH_LINENO[@]: -2:1}$IFS$*" >&9; }
"""
BY_PATH = '{0}() {{ command_not_found_handle {0} "$@"; }}'  # no PATH is asked for a name with a slash in it
SILENT = re.compile(r"\s*(#.*|for .*; do|done|)")  # lines of which nothing is asked


class Block(NamedTuple):
    line: int  # in the page, from 1
    language: str
    lines: list[str]


class Command(NamedTuple):
    line: int
    words: list[str]


def blocks(page: Path) -> list[Block]:
    found: list[Block] = []
    fenced, indented, before = False, False, ""
    for number, line in enumerate(page.read_text().splitlines(), 1):
        code = not fenced and line.startswith("    ") and (indented or not before)
        if fenced:
            fenced = line != "```"
            if fenced:
                found[-1].lines.append(line)
        elif line.startswith("```"):
            fenced = True
            found.append(Block(number + 1, line.removeprefix("```"), []))
        elif code:
            if not indented:
                found.append(Block(number, "sh", []))
            found[-1].lines.append(line)
        else:
            assert before or not line.startswith(" "), f"{page}:{number}: inside a list Markdown's readers differ"
            assert "```" not in line, f"{page}:{number}: a fence stands in the first column"
        indented, before = code, line.strip()
    return found


@cache
def commands(page: Path) -> list[Command]:
    """Those of all sh blocks, and those that text has in `backticks`."""
    lines = page.read_text().splitlines()
    script, text = [""] * len(lines), lines.copy()
    for block in blocks(page):
        span = slice(block.line - 1, block.line - 1 + len(block.lines))
        text[span] = [""] * len(block.lines)
        if block.language == "sh":
            script[span] = block.lines
    taken = asked(script)
    last = ""
    for number, line in enumerate(script, 1):
        asks = not SILENT.fullmatch(line) and not last.endswith("\\")
        assert not asks or number in {c.line for c in taken}, f"{page}:{number}: the shell does not come to it: {line}"
        last = line
    inline = [""] * len(lines)
    plain = re.sub(r"^```.*", "", "\n".join(text), flags=re.M)
    for span in re.finditer(r"`((?:[^`\n]|\n(?!\n))+)`", plain):
        words = [word for word in span[1].split() if not re.match(r"[A-Z_]+=", word)]
        if len(words) > 1 and words[0] in IN_TEXT and MESSAGE not in span[1]:
            inline[plain.count("\n", 0, span.start())] += span[1].replace("\n", " ") + "; "
    return taken + asked(inline)


def asked(script: list[str], **variables: str) -> list[Command]:
    """What a shell would start."""
    names = set(re.findall(r"(?:[\w.][\w.-]*/)+[\w.-]+", "\n".join(script)))
    start = [*SHELL.splitlines(), *(BY_PATH.format(name) for name in sorted(names))]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "script").write_text("\n".join([*start, *script, ""]))
        env = {"USER": "me", "LC_ALL": "C.UTF-8", **variables}
        done = subprocess.run(["bash", "script"], cwd=folder, env=env, capture_output=True, text=True, timeout=20)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        found = [record.split("\x1f") for record in Path(folder, "asked").read_text().split("\x1e")[:-1]]
    return [Command(int(line) - len(start), words) for line, *words in found]


def calls(page: Path) -> list[list[str]]:
    """The words behind each `hpc-lbsgd` of its commands, whatever starts it."""
    lines = [command.words for command in commands(page)]
    return [words[words.index("hpc-lbsgd") + 1 :] for words in lines if "hpc-lbsgd" in words]

"""The manual's pages as a reader takes them: their blocks, and their commands as a shell has them after its work."""

import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt  # rich has it
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
IN_TEXT = {"hpc-lbsgd", "make", "python", "pip", "module", "torchrun", "mpirun", "srun", "salloc", "aprun", "touch"}
MESSAGE = re.compile(r"(?<!:all): ")  # what a program says begins with its name, too

# A shell that can start nothing: it writes down what it is asked for, and the line where. FUNCNEST: a word of the
# handler's own that is not found would have it called in a process more, for ever.
SHELL = r"""exec 9>>asked; set -u; PATH=/nowhere FUNCNEST=5
for b in $(compgen -b); do case $b in printf|local|set|eval|export|enable) ;; *) enable -n "$b" ;; esac; done
command_not_found_handle() { local IFS=$'\x1f'; printf '%s\x1e' "${BASH_LINENO[@]: -2:1}$IFS$*" >&9; }
"""
BY_PATH = '{0}() {{ command_not_found_handle {0} "$@"; }}'  # no PATH is asked for a name with a slash in it
SILENT = re.compile(r"\s*(#.*|for .*; do|done|)")  # lines of which nothing is asked
EITHER = re.compile(r"^[^#]*(\|\||\belse\b)")  # the shell takes one way, and a check sees no other


class Block(NamedTuple):
    line: int  # in the page, from 1
    language: str  # of a fenced block; an indented one is sh
    text: str


class Command(NamedTuple):
    line: int
    words: list[str]


@cache
def tokens(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text())


def blocks(page: Path) -> list[Block]:
    found = [token for token in tokens(page) if token.type in ("fence", "code_block")]
    return [
        Block(token.map[0] + 1 + (token.type == "fence"), token.info if token.type == "fence" else "sh", token.content)
        for token in found
    ]


@cache
def commands(page: Path) -> list[Command]:
    """Those of all sh blocks, and those that text has in `backticks`."""
    script = [""] * len(page.read_text().splitlines())
    for block in blocks(page):
        if block.language == "sh":
            lines = block.text.splitlines()
            script[block.line - 1 : block.line - 1 + len(lines)] = lines
    for token in tokens(page):
        for child in token.children or []:
            words = [word for word in child.content.split() if not re.match(r"[A-Z_]+=", word)]
            command = child.type == "code_inline" and len(words) > 1 and words[0] in IN_TEXT
            if command and not MESSAGE.search(child.content):
                script[token.map[0]] += f"{child.content}; "
    taken = asked(script) if any(script) else []
    known = {command.line for command in taken}
    for number, (last, line) in enumerate(zip(["", *script], script, strict=False), 1):
        seen = number in known or SILENT.fullmatch(line) or last.endswith("\\")
        assert seen and not EITHER.search(line), f"{page}:{number}: the shell does not come to all of it: {line}"
    return taken


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


def quoted(page: Path) -> list[str]:
    """What its text has in `backticks`."""
    return [child.content for token in tokens(page) for child in token.children or [] if child.type == "code_inline"]


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub and mkdocs have them; where those differ, neither."""
    found = tokens(page)
    heads = [text.content for mark, text in zip(found, found[1:], strict=False) if mark.type == "heading_open"]
    plain = [re.sub(r"[^\w\- ]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", head)).lower() for head in heads]
    return {text.replace(" ", "-") for text in plain if not re.search("[ -]{2}", text)}


def calls(page: Path) -> list[list[str]]:
    """The words behind each `hpc-lbsgd` of its commands, whatever starts it."""
    lines = [command.words for command in commands(page)]
    return [words[words.index("hpc-lbsgd") + 1 :] for words in lines if "hpc-lbsgd" in words]

"""Text with tables, made to fit a terminal: what is too wide for it comes in blocks of columns below one another, each
with the first column again. Markdown and aligned text alike."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator

GAP = "  "
FEWEST = 3  # columns of what is taken for a table


def fit(text: str, width: int) -> str:
    """The same text in lines of at most `width` characters, as far as its words allow."""
    paragraphs = re.split(r"(\n\s*\n)", text)
    return "".join(p if is_narrow(p, width) else "\n".join(narrowed(p.split("\n"), width)) for p in paragraphs)


def is_narrow(text: str, width: int) -> bool:
    return all(len(line) <= width for line in text.split("\n"))


def narrowed(lines: list[str], width: int) -> Iterator[str]:
    rows = cells_of(lines)
    if len(rows) > 1 and len(rows[0]) >= FEWEST and all(rows[0]):  # its head names each column
        yield from blocks(rows, width)
        return
    for line in lines:
        yield from wrapped(line, width, len(line) - len(line.lstrip()) + len(GAP))


def wrapped(line: str, width: int, indent: int) -> list[str]:
    if len(line) <= width:
        return [line]
    return textwrap.wrap(line, width, subsequent_indent=" " * min(indent, width // 2), break_on_hyphens=False)


def cells_of(lines: list[str]) -> list[list[str]]:
    """A table's rows; columns of aligned text have two blanks between them in every line."""
    if all(line.startswith("|") for line in lines):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        return [row for row in rows if not all(re.fullmatch(r":?-+:?", cell) for cell in row)]
    longest = max(map(len, lines))
    used = "".join(" " if all(line[i : i + 1].strip() == "" for line in lines) else "x" for i in range(longest))
    spans = [match.span() for match in re.finditer(r"x( ?x)*", used)]
    return [[line[first:last].strip() for first, last in spans] for line in lines]


def blocks(rows: list[list[str]], width: int) -> Iterator[str]:
    rows = [row + [""] * (len(rows[0]) - len(row)) for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    numbers = [all(re.fullmatch(r"[\d.,:+%x±–-]*", row[i]) for row in rows[1:]) for i in range(len(widths))]
    groups: list[list[int]] = [[0]]
    for i in range(1, len(widths)):
        if sum(widths[j] + len(GAP) for j in groups[-1]) + widths[i] > width and len(groups[-1]) > 1:
            groups.append([0])
        groups[-1].append(i)
    for number, group in enumerate(groups):
        if number:
            yield ""
        for row in rows:
            padded = (row[i].rjust(widths[i]) if numbers[i] else row[i].ljust(widths[i]) for i in group)
            yield from wrapped(GAP.join(padded).rstrip(), width, widths[0] + len(GAP))

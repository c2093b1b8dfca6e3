"""`data index` of a table: a row a sample, with the path of its image and its fields. CSV, JSON lines, Parquet.

Read whole, for no kind of file tells its columns' types truly: CSV has none, and readers that guess make floats of
large integers.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from hpc_lbsgd.data import boxes, fields, labels
from hpc_lbsgd.data.fields import CLASS, IMAGE, PREFIX, NoField
from hpc_lbsgd.data.manifest import Manifest
from hpc_lbsgd.data.names import is_utf8, lists_of
from hpc_lbsgd.data.parts import ALL, Share
from hpc_lbsgd.data.tree import Tree, index_files
from hpc_lbsgd.errors import RequestError

PATHS = ("path", "file_name", "filename", "file", IMAGE)  # columns that name the image: the first that is there
CLASSES = (CLASS, "label")  # and its class, where they have names or whole numbers
MASK = "mask"  # column of a mask's path, or the end of its name behind a _
INT, FLOAT = re.compile(r"[+-]?[0-9]{1,40}"), re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
NOT_FINITE = re.compile(r"[+-]?(?:nan|inf|infinity)", re.IGNORECASE)
LONE = re.compile("[\ud800-\udc7f\udd00-\udfff]")  # halves of characters, which stand for no byte of a file's name
LONGEST_CELL = 2**30  # characters; texts have a limit of their own
WORDS = {"": None, "true": True, "false": False}


class Table(NamedTuple):
    path: Path
    columns: dict[str, list]  # by name: a value a row, None where there is none
    texts: bool  # all values are texts, which may say numbers

    def values(self, name: str) -> list:
        return list(map(said_by, self.columns[name])) if self.texts else self.columns[name]

    def wrong(self, name: str, row: int, what: str) -> RequestError:
        return RequestError(f"{self.path}: {name!r} in row {row + 1} {what}")


def is_table(path: str | os.PathLike) -> bool:
    return Path(path).suffix.lower() in READERS and Path(path).is_file()


# ---------------------------------------------------------------- reading


def read(path: Path) -> Table:
    """Raises RequestError for what is no table, has rows of several lengths, no rows, or two columns of one name."""
    suffix = path.suffix.lower()
    try:
        columns = READERS[suffix](path)
    except (OSError, ValueError, RecursionError, csv.Error, pa.ArrowException) as problem:
        raise RequestError(f"{path}: {getattr(problem, 'strerror', None) or problem}") from None
    if not columns or not len(next(iter(columns.values()))):
        raise RequestError(f"{path}: has no rows")
    return Table(path, columns, suffix in (".csv", ".tsv"))


def read_csv(path: Path, delimiter: str = ",") -> dict[str, list]:
    csv.field_size_limit(LONGEST_CELL)
    # names of files may have any bytes
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.reader(file, delimiter=delimiter, strict=True)
        names = [name.strip() for name in next(rows, [])]
        columns: list[list] = [[] for _ in names]
        for number, row in enumerate(filter(None, rows), 1):
            if len(row) != len(names):
                raise ValueError(
                    f"row {number} (line {rows.line_num}) has {len(row)} cells, and the first {len(names)}"
                )
            for column, cell in zip(columns, row, strict=True):
                column.append(cell)
    return by_name(zip(names, columns, strict=True))


def read_json_lines(path: Path) -> dict[str, list]:
    columns: dict[str, list] = {}
    count = 0
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        for line in filter(str.strip, file):
            try:
                row = json.loads(line, object_pairs_hook=by_name)
            except ValueError as problem:
                raise ValueError(f"row {count + 1}: {problem}") from None
            if not isinstance(row, dict):
                raise ValueError(f"row {count + 1}: is no object of names and values")
            for name in (name for name in row if name not in columns):
                columns[name] = [None] * count
            for name, column in columns.items():
                column.append(row.get(name))
            count += 1
    return columns


def read_parquet(path: Path) -> dict[str, list]:
    from pyarrow import parquet

    found = parquet.ParquetFile(path).read()
    return by_name((name, held_by(column)) for name, column in zip(found.column_names, found.columns, strict=True))


def held_by(column: pa.ChunkedArray) -> list:
    try:
        return column.to_pylist()
    except (ValueError, OverflowError):  # times that Python has no type for
        return column.cast(pa.string()).to_pylist()


def by_name(pairs: Iterable[tuple[str, object]]) -> dict:
    found: dict = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"has {name!r} twice")
        if name:  # pandas' own numbering of rows has none
            found[name] = value
    return found


READERS = {
    ".csv": read_csv,
    ".tsv": lambda path: read_csv(path, "\t"),
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".parquet": read_parquet,
}


def said_by(text: str) -> object:
    """What a cell means: a number, a truth, a list of them, nothing; else its text."""
    text = text.strip()
    if INT.fullmatch(text):
        return int(text)
    if FLOAT.fullmatch(text) or NOT_FINITE.fullmatch(text):
        return float(text)
    if text.startswith("["):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return text
    return WORDS.get(text.lower(), text)


# ---------------------------------------------------------------- what the columns are


def scan(table: Table, root: Path, wanted: list[str] | None, path_column: str | None, like: Manifest | None) -> Tree:
    """The images of a table, by class and name, with their fields. wanted: names of fields, or NAME:KIND (default: all
    columns of numbers, masks and boxes). like: a set whose fields have their kinds here too."""
    place = column_named(table, path_column)
    top = os.path.join(os.path.abspath(root), "")
    paths = [below(top, table, place, row, value) for row, value in enumerate(table.columns[place])]
    first: dict[str, int] = {}
    for row, path in enumerate(paths):
        if first.setdefault(path, row) != row:
            raise RequestError(
                f"{table.path}: rows {first[path] + 1} and {row + 1} have one image ({path}): a row a sample"
            )
    kinds = fields.asked(wanted or ())
    said = ("text", "image", "bytes", "mask", "boxes")  # which do not show by themselves
    for name in like.of_kind(*said) if like else ():
        if name in (table.columns if wanted is None else kinds) and not kinds.get(name):
            kinds[name] = like.own_fields[name].kind
    label = next((n for n in CLASSES if n in (kinds if wanted else table.columns) and n in table.columns
                  and n != place and not kinds.get(n)), None)  # fmt: skip
    texts = classes_in(table, label) if label else None
    left_out: Counter[str] = Counter()
    known = like.floats if like else []
    rest = sorted(name for name in table.columns if name != place and (texts is None or name != label))
    missing = sorted(set(kinds) - set(rest) - {label})
    if missing:
        raise RequestError(f"--fields: {table.path} has no column {missing[0]!r}; it has: {', '.join(table.columns)}")
    files = {}
    for name in rest:
        if (kind := file_kind(table, name, kinds)) and (wanted is None or name in kinds):
            files[kind, name] = file_paths(top, table, name)
    others = [name for name in rest if name not in {name for _, name in files}]
    more = dict(fields_of(table, others, wanted and kinds.keys(), kinds, known, left_out))
    names, numbers = labels.number(texts, True, root / "classes.txt") if texts else ([], [0] * len(paths))
    order = sorted(range(len(paths)), key=lambda i: (numbers[i], paths[i]))
    columns = pa.table(more).take(order) if more else None
    files = {field: [found[i] for i in order] for field, found in files.items()}
    return Tree(names, [paths[i] for i in order], [numbers[i] for i in order], left_out, columns, files)


def column_named(table: Table, asked: str | None) -> str:
    """The column of paths."""
    place = next((name for name in ((asked,) if asked else PATHS) if name in table.columns), None)
    if place is None:
        looked_for = repr(asked) if asked else f"of paths ({', '.join(PATHS)})"
        raise RequestError(
            f"{table.path}: no column {looked_for}; it has: {', '.join(map(printable, table.columns))}. Say which "
            "one has the images' paths with --path-column"
        )
    return place


def printable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()


def below(top: str, table: Table, name: str, row: int, value: object) -> str:
    """A path below a folder, whose own ends with a slash."""
    text = os.fsdecode(value) if isinstance(value, bytes) else value
    if not isinstance(text, str) or not text.strip() or "\0" in text or LONE.search(text):
        raise table.wrong(name, row, f"is {repr(value)[:100]}, no path")
    path = os.path.normpath(os.path.join(top, text))
    if not path.startswith(top):
        raise table.wrong(name, row, f"is {printable(text)}: not below {top}; say where paths start with --root")
    return path[len(top) :]


def file_kind(table: Table, name: str, kinds: Mapping[str, str | None]) -> str | None:
    """What a column of paths is of, where it is one: as is said, or a mask by its name."""
    if said := kinds.get(name):
        return said if said in fields.FILES else None
    named = name == MASK or name.endswith(f"_{MASK}")
    return MASK if named and any(isinstance(v, str) for v in table.values(name)) else None


def file_paths(top: str, table: Table, name: str) -> list[str]:
    fields.refuse_name(name, str(table.path))
    paths = [below(top, table, name, row, value) for row, value in enumerate(table.columns[name])]
    odd = next((row for row, path in enumerate(paths) if not is_utf8(path)), None)
    if odd is not None:
        raise table.wrong(name, odd, "is a name that is not UTF-8, which only images may have")
    return paths


def classes_in(table: Table, name: str) -> list[str] | None:
    """The class of each row as text, where a column has names or whole numbers; None where it has other numbers, and is
    a field as others are."""
    values = table.values(name)
    if any(isinstance(v, (float, list)) for v in values):
        return None
    empty = next((row for row, value in enumerate(values) if value is None), None)
    if empty is not None:
        raise table.wrong(name, empty, "has no value")
    if table.texts:
        return [text.strip() for text in table.columns[name]]
    return [os.fsdecode(v) if isinstance(v, bytes) else str(v) for v in values]


def fields_of(
    table: Table,
    names: list[str],
    wanted: Collection[str] | None,
    kinds: Mapping[str, str | None],
    floats: Collection[str],
    left_out: Counter[str],
) -> Iterator[tuple[str, pa.Array]]:
    """(column, values) of each field. Columns of something else are counted, or refused where they are wanted."""
    for name in names:
        if wanted is not None and name not in wanted:
            left_out[f"column {printable(name)} (not asked for)"] += 1
            continue
        values = table.columns[name] if kinds.get(name) == "text" else table.values(name)  # "12" is a text too
        try:
            if not is_utf8(name):
                raise NoField(0, "is in a column whose name is not UTF-8")
            if name in fields.RESERVED:
                raise NoField(0, f"is not the {name} of a sample: give the column another name")
            column = boxes.column_for(name, kinds.get(name), values, name in floats)
        except NoField as problem:
            if wanted is None and not kinds.get(name) and (problem.other or not any(v is not None for v in values)):
                left_out[f"column {printable(name)} (row {problem.row + 1} {problem})"] += 1
                continue
            others = "" if wanted else "; or say which columns to take with --fields"
            raise table.wrong(name, problem.row, f"{problem}: mend it{others}") from None
        yield PREFIX + name, column


def index(
    path: Path,
    out: Path | None = None,
    processes: int | None = None,
    root: Path | None = None,
    wanted: list[str] | None = None,
    path_column: str | None = None,
    like: Manifest | None = None,
    exclude: bool = False,
    share: Share = ALL,
) -> Manifest | int:
    """Write the manifest of a table's samples (default: beside it, as NAME.arrow) and return it, opened.

    root: the folder that its paths are below (default: its own). wanted: the fields to take. like: the training set's
    manifest, whose classes and kinds of fields are meant. exclude, share: as for `tree.index`. Raises RequestError for
    what is no table, a value that is missing or not finite, and images that do not decode.
    """
    root, out = root or path.parent, out or path.with_suffix(".arrow")
    found = scan(read(path), root, wanted, path_column, like)
    classes = like.classes if like is not None and found.classes else None
    return index_files(root, found, out, lists_of(out), processes, classes, exclude, share)

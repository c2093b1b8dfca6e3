"""Which class a sample belongs to: from folders, from a table, from what lies beside an image. A folder and a tar of
one tree give one result."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from hpc_lbsgd.data.columns import slices
from hpc_lbsgd.errors import RequestError

MOST_CLASSES = 1_000_000  # a number above it is not taken for a class
PARTS = {"train", "training", "val", "valid", "validation", "test", "testing", "eval", "images", "img", "data"}
META = "meta.mat"  # of ILSVRC's devkit
NUMBER = re.compile(r"-?\d+")
# a class, then boxes: x y w h, or class x y w h again (Tiny-ImageNet's val_annotations.txt, Kaggle's ILSVRC tables)
WITH_BOXES = re.compile(r"(\S+)(?:(?:\s+-?\d+(?:\.\d+)?){4}(?:\s+\S+(?:\s+-?\d+(?:\.\d+)?){4})*)\s*")


def of_folders(names: Sequence[str]) -> list[str | None]:
    """The class of each path: its first folder, below those that all paths have in common; None without a folder."""
    folders = [PurePosixPath(name).parts[:-1] for name in names]
    common = 0
    # one folder has to be left for each
    shortest = min((len(f) for f in folders if f), default=0)
    while common < shortest - 1 and len({f[common] for f in folders if f}) == 1:
        common += 1
    return [f[common] if f else None for f in folders]


def of_table(path: Path, names: Sequence[str], ids: Path | None = None) -> list[str | None]:
    """The class of each image by a table of names, or by a list of numbers alone as ILSVRC's ground truth is; None
    where a table does not have the name. ids: as for `of_numbers`."""
    lines = read_lines(path)
    numbers = [line.strip() for line in lines if line.strip()]
    if numbers and all(line.isdecimal() for line in numbers):
        return of_numbers(path, numbers, names, ids)
    if ids is not None:
        raise RequestError(f"--ids {ids}: --labels {path} has names, not numbers alone")
    table = read_table(path, lines)
    return [in_table(table, name) for name in names]


def of_numbers(path: Path, numbers: list[str], names: Sequence[str], ids: Path | None) -> list[str | None]:
    """One number a line, in the order of the files' names. ids: which class each number is (default: the devkit's
    meta.mat, which is shipped beside the list)."""
    ids = ids or path.with_name(META)
    if not ids.exists():
        raise RequestError(
            f"--labels {path}: has numbers alone, and no {META} is beside it: say which class each number is with "
            f"--ids FILE (the devkit's {META}, or NUMBER CLASS a line)"
        )
    if len(numbers) != len(names):
        raise RequestError(f"--labels {path}: {len(numbers)} lines for {len(names)} images")
    class_of = read_meta(ids) if ids.suffix == ".mat" else read_ids(ids)
    unknown = next((n for n in numbers if int(n) not in class_of), None)
    if unknown:
        raise RequestError(f"--ids {ids}: no class has the number {unknown}, which {path} has")
    order = in_list_order(path, names)
    found: list[str | None] = [None] * len(names)
    for number, i in zip(numbers, order, strict=True):
        found[i] = class_of[int(number)]
    return found


def in_list_order(path: Path, names: Sequence[str]) -> list[int]:
    """Images in the order of their files' names. Raises RequestError where that may be another than the list's."""
    files = [PurePosixPath(name).name for name in names]
    order = sorted(range(len(names)), key=files.__getitem__)
    for i, following in zip(order, order[1:], strict=False):
        first, second = files[i], files[following]
        if first == second:
            why = f"{names[i]} and {names[following]} have one name"
        elif numbered_otherwise(first, second):
            why = f"{first} comes before {second} by its letters, and behind it by its number"
        else:
            continue
        raise RequestError(
            f"--labels {path}: a list of numbers follows the order of the files' names, and {why}; give a table with "
            "NAME,CLASS a line"
        )
    return order


def numbered_otherwise(first: str, second: str) -> bool:
    """Where two names begin to differ, a number is above the other's: img10 and img9."""
    tokens = zip(re.split(r"(\d+)", first), re.split(r"(\d+)", second), strict=False)
    place, (one, other) = next((i, pair) for i, pair in enumerate(tokens) if pair[0] != pair[1])
    return place % 2 == 1 and int(one) > int(other)


def listing_of(classes: Sequence[str]) -> bytes:
    """classes.txt: a name a line, as JSON has it where it would break the line."""
    lines = (json.dumps(c) if c.startswith('"') or c.splitlines() != [c] else c for c in classes)
    return "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape")


def read_listing(path: Path) -> list[str]:
    lines = path.read_bytes().decode("utf-8-sig", "surrogateescape").split("\n")
    return [unquoted(line.removesuffix("\r")) for line in (lines[:-1] if not lines[-1] else lines)]


def unquoted(line: str) -> str:
    try:
        name = json.loads(line) if line.startswith('"') else line
    except ValueError:
        return line
    return name if isinstance(name, str) else line


def read_meta(path: Path) -> dict[int, str]:
    """ILSVRC's classes (WordNet's IDs) by their numbers in the devkit, from its meta.mat."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise RequestError(
            f"--ids {path}: MATLAB files are read by SciPy, which is not installed: pip install scipy, or give a table "
            "with NUMBER CLASS a line"
        ) from None
    try:
        synsets = loadmat(path, squeeze_me=True)["synsets"]
        return {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets}
    except Exception as problem:  # SciPy raises many kinds for files that are none of MATLAB's
        raise RequestError(f"--ids {path}: not the devkit's {META} ({problem})") from None


def read_ids(path: Path) -> dict[int, str]:
    """NUMBER CLASS or CLASS NUMBER a line; what follows is ignored."""
    found: dict[int, str] = {}
    for line in read_lines(path, "--ids"):
        row = re.split(r"[,\s]+", line.strip())
        number = next((i for i in (0, 1) if len(row) > 1 and row[i].isdecimal()), None)
        if number is not None and found.setdefault(int(row[number]), row[1 - number]) != row[1 - number]:
            raise RequestError(f"--ids {path}: the number {row[number]} has two classes")
    return found


def read_lines(path: Path, option: str = "--labels") -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise RequestError(f"{option} {path}: {getattr(problem, 'strerror', None) or problem}") from None


def read_table(path: Path, lines: list[str]) -> dict[str, str]:
    """NAME,CLASS or NAME CLASS a line; columns of boxes are ignored, and so is a heading. A comma or a tab ends a name
    where the line has one, and a class may then have spaces."""
    table: dict[str, str] = {}
    for line in lines:
        if "," in line:
            try:
                row = next(csv.reader([line]), [])
            except csv.Error as problem:
                raise RequestError(f"--labels {path}: {problem}") from None
        else:
            row = line.split("\t") if "\t" in line else line.split(maxsplit=1)
        if len(row) >= 2 and row[1].strip():
            boxed = WITH_BOXES.fullmatch(row[1].strip())
            name, label = row[0].strip(), boxed[1] if boxed else row[1].strip()
            if table.setdefault(name, label) != label:
                raise RequestError(f"--labels {path}: {name} has two classes, {table[name]!r} and {label!r}")
    return table


def in_table(table: dict[str, str], name: str) -> str | None:
    """A sample's line: by its path, its file's name, or that without its suffix."""
    path = PurePosixPath(name)
    return next((table[key] for key in (name, path.name, path.stem) if key in table), None)


def number(labels: Sequence[str], numbers: bool, listing: Path | None = None) -> tuple[list[str], list[int]]:
    """(names of the classes, label of each sample). numbers: what looks like a number is one, and is kept; names then
    come from `listing`, a line each, where it is there."""
    texts = set(labels)
    for text in texts:
        try:
            text.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            raise RequestError(f"a class is {text!r}: half of a character, which no file can have in it") from None
    count = sum(bool(NUMBER.fullmatch(t)) for t in texts)
    if not numbers or not count:
        names = sorted(texts)
        place = {name: i for i, name in enumerate(names)}
        return names, [place[label] for label in labels]
    if count < len(texts):
        name = next(t for t in sorted(texts) if not NUMBER.fullmatch(t))
        raise RequestError(f"labels are numbers and names: {name!r} beside {next(t for t in texts if t != name)!r}")
    endless = next((t for t in texts if len(t) > 18), None)
    if endless:
        raise RequestError(f"a label is {endless[:20]}...; classes are numbered from 0, up to {MOST_CLASSES:,}")
    lowest, highest = min(map(int, texts)), max(map(int, texts))
    if lowest < 0 or highest >= MOST_CLASSES:
        wrong = lowest if lowest < 0 else highest
        raise RequestError(f"a label is {wrong}; classes are numbered from 0, up to {MOST_CLASSES:,}")
    names = read_listing(listing) if listing and listing.exists() else [str(i) for i in range(highest + 1)]
    if len(names) <= highest:
        raise RequestError(f"{listing}: {len(names)} names, but a label is {highest}")
    return names, [int(label) for label in labels]


def renumber(names: Sequence[str], labels: Sequence[int], classes: list[str], where: str) -> list[int]:
    """Labels in the order of `classes` (those of the training set)."""
    place = {name: i for i, name in enumerate(classes)}
    unknown = sorted({names[label] for label in labels} - place.keys())
    if unknown:
        raise RequestError(f"{where}: class {unknown[0]!r} is not one of the given classes")
    return [place[names[label]] for label in labels]


def doubts(classes: Sequence[str], labels: Sequence[int]) -> list[str]:
    """What looks as if a set was not read as it was meant."""
    if not classes:
        return []
    counts = sum(np.bincount(labels[some], minlength=len(classes)) for some in slices(len(labels)))
    found = []
    parts = [name for name in classes if name.lower() in PARTS]
    if parts:
        found.append(f"classes named {', '.join(parts[:5])}: is this a folder of parts, to be indexed one by one?")
    if len(classes) == 1:
        found.append(f"one class, {classes[0]!r}: expected DIR/CLASS/IMAGE")
    for many, what in ((0, "without an image"), (1, "with a single image")):
        few = [name for i, name in enumerate(classes) if counts[i] == many]
        if few:
            found.append(f"{len(few)} of {len(classes)} classes {what}: {', '.join(few[:5])}{' ...' * (len(few) > 5)}")
    return found

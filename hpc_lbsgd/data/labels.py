"""Which class a sample belongs to: from folders, from a table, from what lies beside an image. A folder and a tar of
one tree give one result."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from hpc_lbsgd.errors import RequestError

MOST_CLASSES = 1_000_000  # a number above it is not taken for a class
PARTS = {"train", "training", "val", "valid", "validation", "test", "testing", "eval", "images", "img", "data"}
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


def read_table(path: Path) -> dict[str, str]:
    """NAME,CLASS or NAME CLASS a line; columns of boxes are ignored, and so is a heading. A comma or a tab ends a name
    where the line has one, and a class may then have spaces."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise RequestError(f"--labels {path}: {getattr(problem, 'strerror', None) or problem}") from None
    table = {}
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
            table[row[0].strip()] = boxed[1] if boxed else row[1].strip()
    return table


def in_table(table: dict[str, str], name: str) -> str | None:
    """A sample's line: by its path, its file's name, or that without its suffix."""
    path = PurePosixPath(name)
    return next((table[key] for key in (name, path.name, path.stem) if key in table), None)


def number(labels: Sequence[str], numbers: bool, listing: Path | None = None) -> tuple[list[str], list[int]]:
    """(names of the classes, label of each sample). numbers: what looks like a number is one, and is kept; names then
    come from `listing`, a line each, where it is there."""
    texts = set(labels)
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
    names = listing.read_text().splitlines() if listing and listing.exists() else [str(i) for i in range(highest + 1)]
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
    counts = np.bincount(labels, minlength=len(classes))
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

"""`data index` of a folder: which files are images, which class each has, and whether it decodes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import pyarrow as pa

from hpc_lbsgd.data import files, labels, parts
from hpc_lbsgd.data.fields import IMAGE
from hpc_lbsgd.data.manifest import CHUNK, FILE_NAME, SUFFIXES, Manifest, Row, listed, with_columns, write
from hpc_lbsgd.data.names import EXCLUDE, add_excluded, lists_of, read_excluded, said_of
from hpc_lbsgd.data.parts import ALL, Share
from hpc_lbsgd.errors import RequestError

ANNOTATIONS = "val_annotations.txt"  # Tiny-ImageNet's table of labels, in the folder that it is of
WNIDS = "wnids.txt"  # its list of classes, in the folder of both parts


def parts_of(root: Path) -> list[Path]:
    """The parts with labels of Tiny-ImageNet's folder, as it is shipped; empty for other folders."""
    parts = [root / "train", root / "val"]
    shipped = (root / WNIDS).is_file() and parts[0].is_dir() and (parts[1] / ANNOTATIONS).is_file()
    return parts if shipped else []


class Tree(NamedTuple):
    """What a folder holds, before images are looked at."""

    classes: list[str]
    paths: list[str]  # below the folder, by class and name
    labels: list[int]
    left_out: Counter[str]  # what is no image, by what it is
    more: pa.Table | None = None  # columns of fields
    files: Mapping[tuple[str, str], list[str]] = MappingProxyType({})  # beside them, by kind and name: a path each


def scan(root: Path, table: Path | None = None, ids: Path | None = None) -> Tree:
    """The images of a folder. One folder a class, any depth below it; with a table of labels, images anywhere.

    A folder as Tiny-ImageNet's val has its table in it. Raises RequestError for a class without images, and for
    folders that cannot be read.
    """
    if not root.is_dir():
        raise RequestError(f"{root}: no such folder")
    left_out: Counter[str] = Counter()
    if table is None and (root / ANNOTATIONS).exists():
        table = root / ANNOTATIONS
    paths = list(images_below(root, left_out))
    if table is not None:
        found = labels.of_table(table, paths, ids)
        missing = [path for path, label in zip(paths, found, strict=True) if label is None]
        if missing:
            raise RequestError(f"{len(missing)} images in {root} have no line in {table}:\n{listed(missing)}")
        classes, numbers = labels.number(found, numbers=True)
    else:
        classes = sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith("."))
        if not classes:
            raise RequestError(f"{root}: no class folders in it; expected {root}/CLASS/IMAGE")
        beside = [path for path in paths if os.sep not in path]
        if beside:
            left_out["images beside the class folders"] = len(beside)
            paths = [path for path in paths if os.sep in path]
        place = {name: i for i, name in enumerate(classes)}
        numbers = [place[path.split(os.sep, 1)[0]] for path in paths]
        empty = sorted(set(range(len(classes))) - set(numbers))
        if empty:
            name = classes[empty[0]]
            raise RequestError(f"{root / name}: class {name!r} has no images ({', '.join(sorted(SUFFIXES))})")
    order = sorted(range(len(paths)), key=lambda i: (numbers[i], paths[i]))
    return Tree(classes, [paths[i] for i in order], [numbers[i] for i in order], left_out)


def images_below(root: Path, left_out: Counter[str]) -> Iterator[str]:
    """Paths of image files below a folder; counts what it passes over. Links to folders are followed for classes alone:
    deeper ones may lead back."""

    def refuse(problem: OSError) -> None:
        raise RequestError(f"{problem.filename}: cannot be read ({problem.strerror})")

    tops = [str(root)]
    for entry in os.scandir(root):
        if entry.is_symlink() and entry.is_dir() and not entry.name.startswith("."):
            target = Path(entry.path).resolve()
            if root.resolve().is_relative_to(target):
                raise RequestError(f"{entry.path}: is a link to {target}, which holds {root} itself; remove it")
            tops.append(entry.path)
    for top in tops:
        for folder, folders, inside in os.walk(top, onerror=refuse):
            linked = [f for f in folders if os.path.islink(os.path.join(folder, f))]
            if folder != str(root):
                left_out.update(f"linked folder {os.path.relpath(os.path.join(folder, f), root)}" for f in linked)
            folders[:] = [f for f in folders if not f.startswith(".")]
            for name in inside:
                suffix = os.path.splitext(name)[1].lower()
                if suffix in SUFFIXES and not name.startswith("."):
                    yield os.path.relpath(os.path.join(folder, name), root)
                elif not name.startswith(".") and folder != str(root):
                    left_out[suffix or "no suffix"] += 1


def index(
    root: str | os.PathLike,
    out: str | os.PathLike | None = None,
    processes: int | None = None,
    table: Path | None = None,
    classes: list[str] | None = None,
    exclude: bool = False,
    ids: Path | None = None,
    share: Share = ALL,
) -> Manifest | int:
    """Write the manifest of a folder of images (default: ROOT/manifest.arrow) and return it, opened.

    table: names and classes, for images that do not lie in folders of their class, or a number for each, whose classes
    `ids` (a file) tells. classes: the names to use, in their
    order (those of the training set, for a validation set). exclude: leave out images that do not decode, and write
    them down. share: look at this part of the images alone, for an index of all that follows; returns how many they
    are. Raises RequestError for a missing folder, an empty class, and images that do not decode (listed by name).
    """
    root = Path(root)
    out = Path(out) if out else root / FILE_NAME
    lists = [*lists_of(out)[1:], root / EXCLUDE]
    return index_files(root, scan(root, table, ids), out, lists, processes, classes, exclude, share)


def index_files(
    root: Path,
    found: Tree,
    out: Path,
    lists: list[Path],
    processes: int | None = None,
    classes: list[str] | None = None,
    exclude: bool = False,
    share: Share = ALL,
) -> Manifest | int:
    """The same of images that are known already. lists: of what is left out; the last is added to."""
    excluded = read_excluded(lists)
    chosen = [i for i, path in enumerate(found.paths) if path not in excluded]
    paths = [found.paths[i] for i in chosen]
    numbers = [found.labels[i] for i in chosen]
    if classes is not None:
        numbers = labels.renumber(found.classes, numbers, classes, str(root))

    def looked_at(kind: str, some: list[str], title: str) -> list:
        chunks = [some[i : i + CHUNK] for i in range(0, len(some), CHUNK)]
        work = [parts.Work(files.examine, files.identities, (str(root), c, kind), len(c)) for c in chunks]
        return [row for rows in parts.rows(out, work, title, processes, share) for row in rows]

    rows = looked_at(IMAGE, paths, f"indexing {root}")
    seen = {
        (kind, name): looked_at(kind, [all_paths[i] for i in chosen], f"indexing {name} of {root}")
        for (kind, name), all_paths in found.files.items()
    }
    if share.count > 1:
        return len(rows)
    for (kind, name), mine in seen.items():
        rows = [files.beside(kind, name, *pair) for pair in zip(rows, mine, strict=True)]
    good = usable(paths, rows, [str(root / path) for path in paths], lists[-1] if exclude else None)
    if gone := len(found.paths) - len(good):
        found.left_out[said_of(lists)] = gone
    columns = ([values[i] for i in good] for values in (paths, numbers, rows))
    more, masks = found.more and found.more.take([chosen[i] for i in good]), {}
    for (kind, name), mine in seen.items():
        own_paths = [found.files[kind, name][chosen[i]] for i in good]
        own, classes_in = files.table_of(kind, name, own_paths, [mine[i] for i in good])
        masks |= {name: classes_in} if kind == "mask" else {}
        more = with_columns(more, own)
    write(out, root, classes or found.classes, *columns, left_out=found.left_out, more=more, masks=masks)
    parts.remove(out)
    return Manifest(out)


def usable(names: list[str], rows: list[Row | str], shown: list[str], excluded_in: Path | None) -> list[int]:
    """The places of images that decode; others are refused, as they are `shown`, or go to a list."""
    bad = [i for i, row in enumerate(rows) if isinstance(row, str)]
    if bad and excluded_in is None:
        raise RequestError(
            f"{len(bad)} of {len(rows)} images cannot be read; mend or remove them, or have them left out (--exclude)"
            f":\n{listed([f'{shown[i]}: {rows[i]}' for i in bad])}"
        )
    if bad:
        add_excluded(excluded_in, [(names[i], rows[i]) for i in bad])
    return [i for i, row in enumerate(rows) if not isinstance(row, str)]

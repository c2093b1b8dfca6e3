"""`data index` of tar files as they are: nothing is unpacked, samples are read where they lie.

Three kinds are understood, told apart by what is in them:
    WebDataset      KEY.jpg and KEY.cls (a number, or a class's name) or KEY.json ({"label": ...})
    tar of tars     as ILSVRC's training images are shipped: one inner tar a class
    image tree      CLASS/IMAGE; or IMAGE alone with a table of labels (--labels), as ILSVRC's validation images
"""

from __future__ import annotations

import csv
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from tqdm import tqdm

from hpc_lbsgd.data import manifest as manifests
from hpc_lbsgd.data.manifest import CHUNK, SUFFIXES, Manifest, checksum, decode, listed
from hpc_lbsgd.data.pool import Pool
from hpc_lbsgd.errors import RequestError

LABEL_KEYS = ("cls", "label", "class", "target")  # of a WebDataset's JSON
LABEL_SUFFIXES = {".cls", ".cls2", ".txt", ".json", ".label"}


class Member(NamedTuple):
    """A regular file inside a tar: where its bytes lie in the outermost file."""

    shard: int
    name: str
    offset: int
    size: int


class Sample(NamedTuple):
    member: Member
    label: str  # a class's name, or a number as text


def is_archive(path: str | os.PathLike) -> bool:
    """A tar file, or a folder that holds tar files."""
    path = Path(path)
    return path.suffix == ".tar" if path.is_file() else path.is_dir() and any(path.glob("*.tar"))


def members(path: Path, shard: int) -> Iterator[Member]:
    """All files of a tar, those of tars inside it included. Refuses what has no business in a data set."""
    try:
        with tarfile.open(path, "r:") as outer:
            for info in outer:
                check(path, info)
                if info.isreg() and info.name.endswith(".tar"):
                    with tarfile.open(fileobj=outer.extractfile(info), mode="r:") as inner:
                        for found in inner:
                            check(path, found)
                            if found.isreg():
                                name = f"{PurePosixPath(info.name).stem}/{found.name}"
                                yield Member(shard, name, info.offset_data + found.offset_data, found.size)
                elif info.isreg():
                    yield Member(shard, info.name, info.offset_data, info.size)
    except tarfile.TarError as problem:
        raise RequestError(f"{path}: not a whole, uncompressed tar file ({problem})") from None


def check(path: Path, info: tarfile.TarInfo) -> None:
    parts = PurePosixPath(info.name)
    if parts.is_absolute() or ".." in parts.parts:
        raise RequestError(f"{path}: member {info.name!r} points outside the archive")
    if info.issym() or info.islnk():
        raise RequestError(f"{path}: member {info.name!r} is a link to {info.linkname!r}")
    if not (info.isreg() or info.isdir()):
        raise RequestError(f"{path}: member {info.name!r} is neither a file nor a folder")


def samples_of(paths: list[Path], labels: dict[str, str] | None) -> list[Sample]:
    """Every image of these tars with its label."""
    images: list[Member] = []
    beside: dict[tuple[int, str], str] = {}  # (shard, key) -> label
    with tqdm(paths, desc="listing", unit="tar", disable=None) as bar:
        for shard, path in enumerate(bar):
            with open(path, "rb") as file:
                for member in members(path, shard):
                    suffix = PurePosixPath(member.name).suffix.lower()
                    if suffix in SUFFIXES:
                        images.append(member)
                    elif suffix in LABEL_SUFFIXES:
                        file.seek(member.offset)
                        text = label_in(file.read(member.size), suffix)
                        if text is not None:
                            beside.setdefault((shard, key_of(member.name)), text)
    if not images:
        raise RequestError(f"{paths[0].parent}: no images ({', '.join(sorted(SUFFIXES))}) in these tar files")
    found, problems = [], []
    for image in images:
        parts = PurePosixPath(image.name).parts
        label = beside.get((image.shard, key_of(image.name)))
        if label is None and labels is not None:
            label = labels.get(parts[-1]) or labels.get(PurePosixPath(parts[-1]).stem)
        elif label is None and len(parts) > 1 and not beside:
            label = parts[-2]
        if label is None:
            problems.append(f"{paths[image.shard]}:{image.name}")
        else:
            found.append(Sample(image, label))
    if problems:
        raise RequestError(
            f"{len(problems)} images have no label: neither a .cls or .json beside them, nor a folder of their class, "
            f"nor a line in --labels:\n{listed(problems)}"
        )
    return found


def distinct(samples: list[Sample], paths: list[Path]) -> list[Sample]:
    """Names that say which sample is meant: with the shard's in front, where shards count anew."""
    if len({s.member.name for s in samples}) == len(samples):
        return samples
    return [s._replace(member=s.member._replace(name=f"{paths[s.member.shard].stem}/{s.member.name}")) for s in samples]


def key_of(name: str) -> str:
    """WebDataset's key: up to the first dot of the file's name."""
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.split('.')[0]}"


def label_in(data: bytes, suffix: str) -> str | None:
    text = data.decode("utf-8", errors="replace").strip()
    if suffix == ".json":
        try:
            content = json.loads(text)
        except ValueError:
            return None
        content = content if isinstance(content, dict) else {"label": content}
        return next((str(content[k]) for k in LABEL_KEYS if k in content), None)
    return text if suffix != ".txt" or text.isdigit() else None  # a .txt may be a caption


def read_labels(path: Path) -> dict[str, str]:
    """NAME,CLASS or NAME CLASS a line; more columns are ignored, and so is a heading."""
    try:
        lines = path.read_text().splitlines()
    except OSError as problem:
        raise RequestError(f"--labels {path}: {problem.strerror}") from None
    table = {}
    for line in lines:
        row = next(csv.reader([line]), []) if "," in line else line.split()
        if len(row) >= 2:
            table[PurePosixPath(row[0]).name] = row[1].split()[0]
    return table


def number_classes(samples: list[Sample], folder: Path) -> tuple[list[str], list[int]]:
    """(names, label of each sample). Numbers are kept; their names come from classes.txt where it is there."""
    texts = {s.label for s in samples}
    if not all(t.isdigit() for t in texts):
        names = sorted(texts)
        place = {name: i for i, name in enumerate(names)}
        return names, [place[s.label] for s in samples]
    count = max(map(int, texts)) + 1
    listing = folder / "classes.txt"
    names = listing.read_text().splitlines() if listing.exists() else [str(i) for i in range(count)]
    if len(names) < count:
        raise RequestError(f"{listing}: {len(names)} names, but a label is {count - 1}")
    return names, [int(s.label) for s in samples]


def examine(path: str, members_: list[Member]) -> list[tuple[int, int, int, int] | str]:
    """For each image (width, height, bytes, checksum), or what is wrong with it."""
    results = []
    with open(path, "rb") as file:
        for member in members_:
            data = os.pread(file.fileno(), member.size, member.offset)
            try:
                facts = decode(data)
                results.append((facts.width, facts.height, len(data), checksum(data)))
            except ValueError as problem:
                results.append(str(problem))
    return results


def index(
    source: str | os.PathLike,
    out: str | os.PathLike | None = None,
    processes: int | None = None,
    labels: Path | None = None,
    classes: list[str] | None = None,
) -> Manifest:
    """Write the manifest of a tar, or of a folder of tars (default: beside them), and return it, opened.

    labels: a table of names and classes for images without either. classes: the names to use, in their order (those
    of the training set, for a validation set). Raises RequestError for members that point outside, images without
    labels and images that do not decode.
    """
    source = Path(source)
    root = source.parent if source.is_file() else source
    paths = [source] if source.is_file() else sorted(source.glob("*.tar"))
    out = Path(out) if out else (source.with_suffix(".arrow") if source.is_file() else root / manifests.FILE_NAME)
    samples = distinct(samples_of(paths, read_labels(labels) if labels else None), paths)
    names, numbers = number_classes(samples, root)
    if classes is not None:
        unknown = sorted(set(names) - set(classes))
        if unknown:
            raise RequestError(f"{source}: class {unknown[0]!r} is not one of the given classes")
        numbers = [classes.index(names[i]) for i in numbers]
        names = classes
    excluded = manifests.read_excluded(out.parent)
    chosen = [i for i, s in enumerate(samples) if s.member.name not in excluded]
    chosen.sort(key=lambda i: (numbers[i], samples[i].member.name))  # as a tree of folders would be
    work = chunks(samples, chosen)
    rows: dict[int, tuple | str] = {}
    with tqdm(total=len(chosen), desc=f"indexing {source}", unit="image", disable=None) as bar:
        with Pool(processes or len(os.sched_getaffinity(0))) as pool:
            futures = [
                pool.submit(examine, str(paths[shard]), [samples[i].member for i in some]) for shard, some in work
            ]
            for (_, some), future in zip(work, futures, strict=True):
                rows.update(zip(some, future.result(), strict=True))
                bar.update(len(some))
    problems = [f"{paths[samples[i].member.shard]}:{samples[i].member.name}: {rows[i]}" for i in chosen
                if isinstance(rows[i], str)]  # fmt: skip
    if problems:
        raise RequestError(
            f"{len(problems)} of {len(chosen)} images cannot be read; list their names in "
            f"{out.parent / manifests.EXCLUDE} to leave them out, then index again:\n{listed(problems)}"
        )
    manifests.write(
        out,
        root,
        names,
        [samples[i].member.name for i in chosen],
        [numbers[i] for i in chosen],
        [rows[i] for i in chosen],
        [(samples[i].member.shard, samples[i].member.offset) for i in chosen],
        [{"name": p.name, "bytes": p.stat().st_size, "checksum": None} for p in paths],
    )
    return Manifest(out)


def chunks(samples: list[Sample], chosen: list[int]) -> list[tuple[int, list[int]]]:
    """(shard, sample numbers) of work items, in the order of the file, so that disks read forward."""
    by_shard: dict[int, list[int]] = {}
    for i in sorted(chosen, key=lambda i: samples[i].member.offset):
        by_shard.setdefault(samples[i].member.shard, []).append(i)
    return [
        (shard, some[i : i + CHUNK]) for shard, some in sorted(by_shard.items()) for i in range(0, len(some), CHUNK)
    ]

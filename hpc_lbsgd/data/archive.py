"""`data index` of tar files as they are: nothing is unpacked, samples are read where they lie.

Three kinds are understood, told apart by what is in them:
    WebDataset      KEY.jpg and KEY.cls (a number, or a class's name) or KEY.json ({"label": ...}); fields: beside.py
    tar of tars     as ILSVRC's training images are shipped: one inner tar a class
    image tree      CLASS/IMAGE; or IMAGE alone with a table of labels (--labels), as ILSVRC's validation images
"""

from __future__ import annotations

import json
import os
import tarfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from hpc_lbsgd import progress
from hpc_lbsgd.data import labels, parts, tree
from hpc_lbsgd.data import manifest as manifests
from hpc_lbsgd.data.beside import Beside, Fields, Member, checked, examined, json_in, looked_at, table_of
from hpc_lbsgd.data.fields import CLASS, IMAGE
from hpc_lbsgd.data.manifest import CHUNK, PARTS, SUFFIXES, Manifest, listed
from hpc_lbsgd.data.names import lists_of, read_excluded, said_of
from hpc_lbsgd.data.parts import ALL, Share
from hpc_lbsgd.data.tree import usable
from hpc_lbsgd.errors import RequestError

BLOCK = tarfile.BLOCKSIZE  # bytes; a tar ends with two of zeros
LABEL_KEYS = ("cls", "label", "class", "target")  # of a WebDataset's JSON
LONGEST_LABEL = 2**20  # bytes of a file that holds one
LABEL_SUFFIXES = {".cls", ".cls2", ".txt", ".json", ".label"}


class Sample(NamedTuple):
    member: Member
    label: str  # a class's name, or a number as text


def is_archive(path: str | os.PathLike) -> bool:
    """A tar file, or a folder that holds tar files."""
    path = Path(path)
    return path.suffix == ".tar" if path.is_file() else path.is_dir() and any(path.glob("*.tar"))


def members(path: Path, shard: int) -> Iterator[Member]:
    """All files of a tar, those of tars inside it included. Refuses what has no business in a data set."""
    with open(path, "rb") as file:
        for outer, info in whole(file, str(path), os.fstat(file.fileno()).st_size):
            if info.name.endswith(".tar"):
                for _, found in whole(outer.extractfile(info), f"{path}:{info.name}", info.size):
                    name = f"{PurePosixPath(info.name).stem}/{found.name}"
                    yield Member(shard, name, info.offset_data + found.offset_data, found.size)
            else:
                yield Member(shard, info.name, info.offset_data, info.size)


def whole(file: BinaryIO, path: str, size: int) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """(the tar, a regular file in it) of a tar that is all there: up to its two end blocks, and zeros behind them.

    tarfile ends in silence at a header that it cannot read, where what follows (a damaged part, an archive that was
    joined to the first) would be left out.
    """
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                check(path, info)
                info.name = str(PurePosixPath(info.name))  # without ./
                if info.isreg() and not any(part.startswith(".") for part in PurePosixPath(info.name).parts):
                    yield tar, info
            at = tar.offset
    except (tarfile.TarError, ValueError, ArithmeticError, LookupError) as problem:  # numbers that are none, or absurd
        raise RequestError(f"{path}: not a whole, uncompressed tar file ({problem})") from None
    if size < at + 2 * BLOCK:
        raise RequestError(f"{path}: ends at byte {size} without a tar's two end blocks: cut, or still being written")
    file.seek(at)
    while block := file.read(2**20):
        if block.count(0) != len(block):
            first = at + next(i for i, byte in enumerate(block) if byte)
            raise RequestError(
                f"{path}: more follows where its list of files ends, from byte {first - first % BLOCK} on (a damaged "
                "header, or another archive joined to this one); nothing behind it would be read"
            )
        at += len(block)


def check(path: str, info: tarfile.TarInfo) -> None:
    parts = PurePosixPath(info.name)
    if parts.is_absolute() or ".." in parts.parts:
        raise RequestError(f"{path}: member {info.name!r} points outside the archive")
    if info.issym() or info.islnk():
        raise RequestError(f"{path}: member {info.name!r} is a link to {info.linkname!r}")
    if info.size < 0:  # tarfile would go back, and come by here for ever
        raise RequestError(f"{path}: member {info.name!r} says that it has {info.size} bytes")
    if info.issparse():
        raise RequestError(f"{path}: member {info.name!r} is stored with holes (tar -S): its bytes do not lie together")
    if not (info.isreg() or info.isdir()):
        raise RequestError(f"{path}: member {info.name!r} is neither a file nor a folder")


class Listed(NamedTuple):
    """What tars hold, before images are looked at."""

    samples: list[Sample]
    numbers: bool  # labels that look like numbers are numbers
    left_out: Counter[str]  # files that are neither images nor labels, by what they are
    fields: Fields
    kinds: dict[str, str | None]  # of these, where it was said


def samples_of(
    paths: list[Path], table: Path | None, ids: Path | None = None, wanted: list[str] | None = None
) -> Listed:
    """Every image of these tars with its label, and the fields that are wanted."""
    images: list[Member] = []
    beside: dict[tuple[int, str], dict[str, str]] = {}  # (shard, key) -> label by the suffix of its file
    own = Beside(wanted or ())
    left_out: Counter[str] = Counter()
    known: set[tuple[int, str]] = set()
    with progress.bar(paths, desc="listing", unit="tar") as bar:
        for shard, path in enumerate(bar):
            with open(path, "rb") as file:
                for member in members(path, shard):
                    suffix = PurePosixPath(member.name).suffix.lower()
                    if suffix in SUFFIXES or suffix in LABEL_SUFFIXES:
                        if (shard, member.name) in known:
                            raise RequestError(f"{path}: holds {member.name} twice (tar -r?); pack it anew")
                        known.add((shard, member.name))
                    if suffix in SUFFIXES:
                        images.append(member)
                    elif own.take(member, lambda m=member, file=file: os.pread(file.fileno(), m.size, m.offset)):
                        continue
                    elif suffix in LABEL_SUFFIXES and member.size <= LONGEST_LABEL:
                        data = os.pread(file.fileno(), member.size, member.offset)
                        if wanted and suffix == ".json":
                            own.said[member.key] = json_in(data)
                        text = label_in(data, suffix, own.kinds)
                        if text is not None:
                            beside.setdefault(member.key, {})[suffix] = text
                    else:
                        left_out[f"{suffix or 'no suffix'}"] += 1
    if not images:
        raise RequestError(f"{paths[0].parent}: no images ({', '.join(sorted(SUFFIXES))}) in these tar files")
    keys = {image.key for image in images}
    beside = {key: found for key, found in beside.items() if key in keys}  # not a VERSION.txt in a tree of classes
    more, with_classes = Fields({}, {}), table is not None or wanted is None or CLASS in wanted
    if wanted is not None:
        images, more = own.fields(images, left_out)
    elif beside:
        images = inputs_of(images, beside, left_out)
    if table is not None:
        found = labels.of_table(table, [image.name for image in images], ids)
    elif not with_classes:
        found = [""] * len(images)
    elif beside:
        found = [one_label(beside.get(i.key, {}), paths[i.shard], i) for i in images]
    else:
        found = labels.of_folders([image.name for image in images])
    problems = [f"{paths[i.shard]}:{i.name}" for i, label in zip(images, found, strict=True) if label is None]
    if problems:
        raise RequestError(
            f"{len(problems)} images have no label: neither a .cls or .json beside them, nor a folder of their class, "
            f"nor a line in --labels:\n{listed(problems)}"
        )
    samples = [Sample(*pair) for pair in zip(images, found, strict=True)]
    return Listed(samples, bool(beside) or table is not None, left_out, more, own.kinds)


def inputs_of(images: list[Member], beside: Mapping, left_out: Counter[str]) -> list[Member]:
    """The images that a WebDataset's samples are of. Of KEY.jpg and KEY.seg.png the second is another field; two plain
    ones say nothing about which it is."""
    plain: dict[tuple[int, str], list[Member]] = {}
    for image in images:
        if image.field in SUFFIXES:
            plain.setdefault(image.key, []).append(image)
    several = [i for found in plain.values() if len(found) > 1 for i in found if i.key in beside]
    if several:
        raise RequestError(f"a sample has several images, and one label: {', '.join(i.name for i in several[:2])}")
    chosen = []
    for image in images:
        if image.field in SUFFIXES or image.key not in plain:
            chosen.append(image)
        else:
            left_out[f"{image.field} beside an image"] += 1
    return chosen


def one_label(found: Mapping[str, str], path: Path, image: Member) -> str | None:
    """The label of a sample from the files beside it; those that name a class must agree."""
    said = {suffix: text for suffix, text in found.items() if suffix != ".txt"} or found  # a .txt may be something else
    if len(set(said.values())) > 1:
        named = ", ".join(f"{suffix} says {text!r}" for suffix, text in sorted(said.items()))
        raise RequestError(f"{path}:{image.name}: {named}")
    return next(iter(said.values()), None)


def distinct(samples: list[Sample], paths: list[Path]) -> list[Sample]:
    """Names that say which sample is meant: with the shard's in front, where shards count anew."""
    if len({s.member.name for s in samples}) == len(samples):
        return samples
    return [s._replace(member=s.member._replace(name=f"{paths[s.member.shard].stem}/{s.member.name}")) for s in samples]


def label_in(data: bytes, suffix: str, others: Collection[str] = ()) -> str | None:
    """A class's name or number in a file beside an image; None where there is none. others: fields of JSON that are
    none."""
    text = data.decode("utf-8-sig", errors="surrogateescape").strip()  # as names of folders, which may be classes too
    if suffix == ".json":
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            return None
        content = content if isinstance(content, dict) else {"label": content}
        found = next((content[k] for k in LABEL_KEYS if k in content and k not in others), None)
        text = str(found) if isinstance(found, (int, str)) and not isinstance(found, bool) else ""
    if suffix == ".txt" and not text.isdigit():  # a caption
        return None
    return text or None


def index(
    source: str | os.PathLike,
    out: str | os.PathLike | None = None,
    processes: int | None = None,
    table: Path | None = None,
    classes: list[str] | None = None,
    exclude: bool = False,
    ids: Path | None = None,
    share: Share = ALL,
    wanted: list[str] | None = None,
    floats: Collection[str] = (),
) -> Manifest | int:
    """Write the manifest of a tar, or of a folder of tars (default: beside them), and return it, opened.

    table, classes, exclude, ids, share: as for `tree.index`. wanted: fields beside the images (default: the class
    alone). floats: fields that are float whatever their numbers look like. Raises RequestError for members that point
    outside, images without labels and images that do not decode.
    """
    source = Path(source)
    root = source.parent if source.is_file() else source
    if (root / PARTS).exists():
        raise RequestError(f"{root}: a pack is under way there, or was ended; start the same `data pack` again")
    paths = [source] if source.is_file() else sorted(source.glob("*.tar"))
    loose = None if source.is_file() else next(tree.images_below(source, Counter()), None)
    if loose:
        raise RequestError(f"{source}: has tar files ({paths[0].name}) and images ({loose}); index a tar by its name")
    out = Path(out) if out else (source.with_suffix(".arrow") if source.is_file() else root / manifests.FILE_NAME)
    found = samples_of(paths, table, ids, wanted)
    samples = distinct(found.samples, paths)
    said = [s.label for s in samples]
    names, numbers = labels.number(said, found.numbers, root / "classes.txt") if any(said) else ([], [0] * len(said))
    if classes is not None and names:
        numbers = labels.renumber(names, numbers, classes, str(source))
    lists = lists_of(out)
    excluded = read_excluded(lists)
    chosen = [i for i, s in enumerate(samples) if s.member.name not in excluded]
    chosen.sort(key=lambda i: (numbers[i], samples[i].member.name))  # as a tree of folders would be
    work = chunks(samples, chosen)
    title = f"indexing {source}"
    by_sample = looked_at(IMAGE, [s.member for s in samples], paths, work, out, title, processes, share)
    seen = examined(found.fields, paths, work, out, processes, share)
    if share.count > 1:
        return len(by_sample)
    chosen_members = [samples[i].member for i in chosen]
    rows, keys = checked([by_sample[i] for i in chosen], chosen, seen), [member.name for member in chosen_members]
    shown = [f"{paths[member.shard]}:{member.name}" for member in chosen_members]
    good = usable(keys, rows, shown, lists[-1] if exclude else None)
    if gone := len(samples) - len(good):
        found.left_out[said_of(lists)] = gone
    kept, their_names = [chosen[i] for i in good], [shown[i] for i in good]
    more, classes_in = table_of(found.fields, found.kinds, kept, seen, their_names, floats)
    manifests.write(
        out,
        root,
        names and (classes or names),
        [keys[i] for i in good],
        [numbers[chosen[i]] for i in good],
        [rows[i] for i in good],
        [(chosen_members[i].shard, chosen_members[i].offset) for i in good],
        [{"name": p.name, "bytes": p.stat().st_size, "checksum": None} for p in paths],
        found.left_out,
        more,
        classes_in,
    )
    parts.remove(out)
    return Manifest(out)


def chunks(samples: list[Sample], chosen: list[int]) -> list[tuple[int, list[int]]]:
    """(shard, sample numbers) of work items, in the order of the file, so that disks read forward."""
    by_shard: dict[int, list[int]] = {}
    for i in sorted(chosen, key=lambda i: samples[i].member.offset):
        by_shard.setdefault(samples[i].member.shard, []).append(i)
    return [
        (shard, some[i : i + CHUNK]) for shard, some in sorted(by_shard.items()) for i in range(0, len(some), CHUNK)
    ]

"""`data verify`: decode every image of a set and say what is wrong, before a run finds out at hour three."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from hpc_lbsgd.data import archive, names, tree
from hpc_lbsgd.data.decode import Facts, decode_all
from hpc_lbsgd.data.elsewhere import blocks, reach
from hpc_lbsgd.data.files import AT_A_TIME, content_of, looked_at
from hpc_lbsgd.data.find import find, is_plain_folder
from hpc_lbsgd.data.manifest import CHUNK, Manifest, checksum
from hpc_lbsgd.data.packed import ChangedError
from hpc_lbsgd.data.pool import in_order
from hpc_lbsgd.data.reach import Missing
from hpc_lbsgd.data.remote import Remote
from hpc_lbsgd.data.storage import SampleError, open_storage
from hpc_lbsgd.errors import RequestError, RunError

# Kinds of findings, worst first. Images of the first group cannot be trained on.
UNUSABLE = ("missing", "changed", "empty", "truncated", "corrupt")
SHARD = "shard"  # a tar file, where the damage is in no sample
ODD = ("cmyk", "16-bit", "grey", "extension", "duplicate")
MEANING = {
    "missing": "cannot be read",
    "changed": "not the bytes that were indexed",
    "empty": "no bytes",
    "truncated": "ends early",
    "corrupt": "does not decode",
    "shard": "a tar file is not what was written, outside of samples; it is not staged, and not to be trusted",
    "cmyk": "four colours, made for print; decoded as RGB",
    "16-bit": "more than 8 bits a channel; scaled to 8",
    "grey": "one channel, in a set where most have three",
    "extension": "the name says another format",
    "duplicate": "the same bytes as an earlier one",
}
FORMATS = {
    "JPEG": {".jpg", ".jpeg"},
    "MPO": {".jpg", ".jpeg"},  # a JPEG with more pictures behind it
    "PNG": {".png"},
    "BMP": {".bmp"},
    "PPM": {".ppm", ".pgm"},
    "WEBP": {".webp"},
    "TIFF": {".tif", ".tiff"},
}


class Finding(NamedTuple):
    path: str
    kind: str
    detail: str


class Verified(NamedTuple):
    excluded: Path  # the list of what is left out of it
    samples: int
    findings: list[Finding]

    @property
    def unusable(self) -> list[Finding]:
        return [f for f in self.findings if f.kind in UNUSABLE]

    @property
    def damaged(self) -> bool:
        """Something is wrong that leaving out samples does not mend."""
        return any(f.kind == SHARD for f in self.findings)


class Seen(NamedTuple):
    """One image: its findings, and what is compared across the set."""

    path: str
    findings: list[tuple[str, str]]
    checksum: int | None
    grey: bool


def look(path: str, data: bytes, facts: Facts | str, expected: int | None) -> Seen:
    """One image's bytes, and what its decoding said. expected: its checksum when it was indexed."""
    check = checksum(data)
    if expected is not None and check != expected:
        return Seen(path, [("changed", "checksum differs from the index")], check, False)
    if not data:
        return Seen(path, [("empty", "0 bytes")], None, False)
    if isinstance(facts, str):
        kind = "truncated" if "truncated" in facts.lower() else "corrupt"
        return Seen(path, [(kind, facts)], check, False)
    found = []
    if facts.mode == "CMYK":
        found.append(("cmyk", facts.mode))
    if facts.mode.startswith("I;16"):
        found.append(("16-bit", facts.mode))
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in FORMATS.get(facts.format, ()):
        found.append(("extension", f"{suffix or 'none'}, but it is {facts.format}"))
    return Seen(path, found, check, facts.mode in ("L", "LA", "1"))


def look_at_files(root: str, paths: list[str]) -> list[Seen]:
    """Files of a tree that was not indexed."""

    def read(path: str, _: int) -> bytes | Seen:
        content = content_of(os.path.join(root, path))
        return Seen(path, [("missing", content)], None, False) if isinstance(content, str) else content

    return look_at_all([(path, i, None) for i, path in enumerate(paths)], read)


def look_at_samples(manifest: str, samples: range) -> list[Seen]:
    """Samples of a manifest, wherever they lie."""
    m = Manifest(Path(manifest))
    storage = open_storage(m)

    def read(path: str, sample: int) -> bytes | Seen:
        try:
            data = storage.content(sample).tobytes()
        except SampleError as problem:
            return Seen(path, [unread(problem)], None, False)
        if m.raw_channels or m.own:  # pixels, numbers: there is nothing to decode
            check = checksum(data)
            same = check == int(m.checksums[sample])
            return Seen(path, [] if same else [("changed", "checksum differs from the index")], check, False)
        return data

    found = []
    for some in (samples[i : i + AT_A_TIME] for i in range(0, len(samples), AT_A_TIME)):
        if isinstance(storage, Remote):
            storage.expect(storage.pieces(some, [None, *m.files]), 0)
        seen = look_at_all([(m.key(sample), sample, int(m.checksums[sample])) for sample in some], read)
        for name in m.files:
            seen = [one._replace(findings=one.findings + look_at_file(m, storage, name, sample))
                    for sample, one in zip(some, seen, strict=True)]  # fmt: skip
        found += seen
    return found


def unread(problem: SampleError) -> tuple[str, str]:
    return ("changed" if isinstance(problem, ChangedError) else "missing"), str(problem)


def look_at_file(m: Manifest, storage, name: str, sample: int) -> list[tuple[str, str]]:
    """What is wrong with a file beside a sample's image."""
    kind = m.own_fields[name].kind
    try:
        data = storage.content(sample, name).tobytes()
    except SampleError as problem:
        return [unread(problem)]
    if checksum(data) != int(m.of_file(name, "checksum")[sample]):
        return [("changed", f"{name}: checksum differs from the index")]
    if kind == "image" and m.raw_channels:
        return []
    (found,) = looked_at(kind, [data])
    return [("corrupt", f"{name}: {found}")] if isinstance(found, str) else []


def look_at_all(work: list[tuple[str, int, int | None]], read: Callable[[str, int], bytes | Seen]) -> list[Seen]:
    """work: (path, number, checksum when it was indexed). read: an image's bytes, or what is wrong without them."""
    seen = []
    for start in range(0, len(work), AT_A_TIME):
        some = work[start : start + AT_A_TIME]
        contents = [read(path, number) for path, number, _ in some]
        facts = iter(decode_all([c for c in contents if isinstance(c, bytes)]))
        seen += [
            content if isinstance(content, Seen) else look(path, content, next(facts), expected)
            for (path, _, expected), content in zip(some, contents, strict=True)
        ]
    return seen


def shard_checksum(m: Manifest, shard: dict) -> str:
    """As `pack` has it: 64 bits of BLAKE2b, in hexadecimal."""
    digest = hashlib.blake2b(digest_size=8)
    if m.remote:
        for block in blocks(reach(m.root), shard["name"], shard["bytes"], f"{m.root}/{shard['name']}"):
            digest.update(block)
        return digest.hexdigest()
    with open(m.root / shard["name"], "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def look_at_shards(m: Manifest, known: set[str]) -> list[Finding]:
    """Tar files that are not what they were, where it does not show in a sample: headers, labels, ends. known: samples
    that were found to be damaged."""
    found = []
    explained = {int(m.shard_of[i]) for i in range(len(m)) if m.key(i) in known} if m.shards and known else set()
    for number, shard in enumerate(m.shards):
        if number in explained:
            continue
        path = m.shard_place(number)
        try:
            if shard["checksum"] is None and m.remote:
                continue  # of others, and of its headers nothing is known
            if shard["checksum"] is None:
                members = {(member.offset, member.size) for member in archive.members(Path(path), number)}
                places: set[tuple[int, int]] = set()
                for some in m.looked_at(all_of_it=True):
                    mine = m.shard_of[some] == number
                    places |= set(zip(m.offsets[some][mine].tolist(), m.sizes[some][mine].tolist(), strict=True))
                if places - members:
                    found.append(Finding(shard["name"], SHARD, f"{len(places - members)} samples lie elsewhere"))
            elif shard_checksum(m, shard) != shard["checksum"]:
                found.append(Finding(shard["name"], SHARD, "not the bytes that were packed"))
        except (RequestError, RunError, Missing) as problem:
            found.append(Finding(shard["name"], SHARD, str(problem)))
        except OSError as problem:
            found.append(Finding(shard["name"], SHARD, problem.strerror or str(problem)))
    return found


def verify(path: str | os.PathLike, processes: int | None = None) -> Verified:
    """Look at every image of a manifest or of a DIR/CLASS/IMAGE tree, in parallel, with a progress bar."""
    if is_plain_folder(path):
        root = Path(path)
        excluded = root / names.EXCLUDE
        gone = names.read_excluded([excluded])
        paths = [p for p in tree.scan(root).paths if p not in gone]
        work = [(look_at_files, str(root), paths[i : i + CHUNK]) for i in range(0, len(paths), CHUNK)]
        count, m = len(paths), None
    else:
        m = Manifest(find(path))
        m.check_labels(all_of_them=True)
        m.check_content(at_any_size=True)
        excluded, count = names.lists_of(m.path)[-1], len(m)
        work = [(look_at_samples, str(m.path), range(i, min(i + CHUNK, count))) for i in range(0, count, CHUNK)]
    seen = [one for some in in_order(work, count, f"verifying {path}", processes) for one in some]
    found = findings_of(seen)
    shards = look_at_shards(m, {f.path for f in found if f.kind in UNUSABLE}) if m is not None else []
    return Verified(excluded, count, shards + found)


def findings_of(seen: list[Seen]) -> list[Finding]:
    """All findings, worst first, with what only the whole set can tell."""
    found = [Finding(s.path, kind, detail) for s in seen for kind, detail in s.findings]
    grey = [s for s in seen if s.grey]
    if len(grey) * 2 < len(seen):
        found += [Finding(s.path, "grey", "one channel") for s in grey]
    first: dict[int, str] = {}
    for s in seen:
        if s.checksum is None or any(kind in UNUSABLE for kind, _ in s.findings):
            continue
        if s.checksum in first:
            found.append(Finding(s.path, "duplicate", f"of {first[s.checksum]}"))
        first.setdefault(s.checksum, s.path)
    order = {kind: i for i, kind in enumerate(UNUSABLE + ODD)}
    return sorted(found, key=lambda f: (order[f.kind], f.path))


def write_excluded(found: Verified) -> Path:
    """Add what cannot be used to its list; the set leaves it out from now on."""
    return names.add_excluded(found.excluded, [(f.path, f"{f.kind}: {f.detail}") for f in found.unusable])


def as_json(found: Verified, excluded: Path | None) -> dict:
    return {
        "samples": found.samples,
        "unusable": len(found.unusable),
        "counts": dict(Counter(f.kind for f in found.findings)),
        "findings": [f._asdict() for f in found.findings],
        "excluded": str(excluded) if excluded else None,
    }


def show(found: Verified, excluded: Path | None) -> str:
    counts = Counter(f.kind for f in found.findings)
    lines = [f"{f.kind:10s} {f.path}: {f.detail}" for f in found.findings]
    lines += [f"{n:8d} {kind}: {MEANING[kind]}" for kind, n in counts.items()]
    lines += [f"{found.samples} images, {len(found.unusable)} of them cannot be used"]
    if excluded:
        lines += [f"left out from now on: {excluded}"]
    elif found.unusable:
        lines += ["--exclude leaves them out of this set"]
    return "\n".join(lines)

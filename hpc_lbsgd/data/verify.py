"""`data verify`: decode every image of a set and say what is wrong, before a run finds out at hour three."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from hpc_lbsgd.data import manifest as manifests
from hpc_lbsgd.data.manifest import CHUNK, EXCLUDE, Manifest, checksum, decode
from hpc_lbsgd.data.pool import Pool
from hpc_lbsgd.data.storage import SampleError, open_storage
from hpc_lbsgd.records import write_atomically

# Kinds of findings, worst first. Images of the first group cannot be trained on.
UNUSABLE = ("missing", "changed", "empty", "truncated", "corrupt")
ODD = ("cmyk", "16-bit", "grey", "extension", "duplicate")
MEANING = {
    "missing": "cannot be read",
    "changed": "not the bytes that were indexed",
    "empty": "no bytes",
    "truncated": "ends early",
    "corrupt": "does not decode",
    "cmyk": "four colours, made for print; decoded as RGB",
    "16-bit": "more than 8 bits a channel; cut to 8",
    "grey": "one channel, in a set where most have three",
    "extension": "the name says another format",
    "duplicate": "the same bytes as an earlier one",
}
FORMATS = {
    "JPEG": {".jpg", ".jpeg"},
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
    root: Path  # where exclude.txt belongs
    samples: int
    findings: list[Finding]

    @property
    def unusable(self) -> list[Finding]:
        return [f for f in self.findings if f.kind in UNUSABLE]


class Seen(NamedTuple):
    """One image: its findings, and what is compared across the set."""

    path: str
    findings: list[tuple[str, str]]
    checksum: int | None
    grey: bool


def look(path: str, data: bytes, expected: int | None) -> Seen:
    """One image's bytes. expected: its checksum when it was indexed."""
    check = checksum(data)
    if expected is not None and check != expected:
        return Seen(path, [("changed", "checksum differs from the index")], check, False)
    if not data:
        return Seen(path, [("empty", "0 bytes")], None, False)
    try:
        facts = decode(data)
    except ValueError as problem:
        kind = "truncated" if "truncated" in str(problem).lower() else "corrupt"
        return Seen(path, [(kind, str(problem))], check, False)
    found = []
    if facts.mode == "CMYK":
        found.append(("cmyk", facts.mode))
    if facts.mode.startswith("I;16") or facts.mode in ("I", "F"):
        found.append(("16-bit", facts.mode))
    suffix = os.path.splitext(path)[1].lower()
    if facts.format in FORMATS and suffix not in FORMATS[facts.format]:
        found.append(("extension", f"{suffix or 'none'}, but it is {facts.format}"))
    return Seen(path, found, check, facts.mode in ("L", "LA", "1"))


def look_at_files(root: str, paths: list[str]) -> list[Seen]:
    """Files of a tree that was not indexed."""
    seen = []
    for path in paths:
        try:
            seen.append(look(path, Path(root, path).read_bytes(), None))
        except OSError as problem:
            seen.append(Seen(path, [("missing", problem.strerror or str(problem))], None, False))
    return seen


def look_at_samples(manifest: str, samples: range) -> list[Seen]:
    """Samples of a manifest, wherever they lie."""
    m = Manifest(Path(manifest))
    storage, seen = open_storage(m), []
    for sample in samples:
        path, expected = m.key(sample), int(m.checksums[sample])
        try:
            data = storage.content(sample).tobytes()
        except SampleError as problem:
            seen.append(Seen(path, [("missing", str(problem))], None, False))
            continue
        if m.raw_channels and checksum(data) == expected:  # pixels: there is nothing to decode
            seen.append(Seen(path, [], expected, False))
        else:
            seen.append(look(path, data, expected))
    return seen


def verify(path: str | os.PathLike, processes: int | None = None) -> Verified:
    """Look at every image of a manifest or of a DIR/CLASS/IMAGE tree, in parallel, with a progress bar."""
    if manifests.is_plain_folder(path):
        root = Path(path)
        _, paths, _ = manifests.scan(root)
        gone = manifests.read_excluded(root)
        paths = [p for p in paths if p not in gone]
        work = [(look_at_files, str(root), paths[i : i + CHUNK]) for i in range(0, len(paths), CHUNK)]
        count = len(paths)
    else:
        m = Manifest(manifests.find(path))
        root, count = m.path.parent, len(m)
        work = [(look_at_samples, str(m.path), range(i, min(i + CHUNK, count))) for i in range(0, count, CHUNK)]
    seen: list[Seen] = []
    processes = min(processes or len(os.sched_getaffinity(0)), max(1, len(work)))
    with tqdm(total=count, desc=f"verifying {path}", unit="image", disable=None) as bar:

        def add(some: list[Seen]) -> None:
            seen.extend(some)
            bar.update(len(some))

        if processes == 1:
            for function, *arguments in work:
                add(function(*arguments))
        else:
            with Pool(processes) as pool:
                for future in [pool.submit(*item) for item in work]:
                    add(future.result())
    return Verified(root, count, findings_of(seen))


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
    """Add what cannot be used to exclude.txt; manifests beside it leave those rows out from now on."""
    path = found.root / EXCLUDE
    before = path.read_text() if path.exists() else ""
    known = manifests.read_excluded(found.root)
    new = [f"{f.path}\t{f.kind}: {f.detail}".replace("\n", " ") for f in found.unusable if f.path not in known]
    write_atomically(path, before + "".join(f"{line}\n" for line in new))
    return path


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

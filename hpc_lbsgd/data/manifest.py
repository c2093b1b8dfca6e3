"""The list of a data set's images: path, label, width, height, size in bytes, checksum.

A manifest is one Arrow file, mapped into memory, never read whole: at 1.28 million images each rank of a node
shares the same pages. Rows are sorted by class and name, so a manifest is a function of the files alone.

Images lie in files below `root`, or in tar shards there (`data pack`, or an archive that was indexed): then two more
columns say in which shard and where. A file `exclude.txt` beside a manifest (`data verify`) takes rows away.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from hpc_lbsgd.data.pool import Pool
from hpc_lbsgd.errors import RequestError

FILE_NAME = "manifest.arrow"
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff"}
NAMED_AT_MOST = 20  # problems listed by name before "and N more"
FILES_CHECKED_AT_START = 100_000  # above it, a start looks at a random selection; `data verify` looks at all
CHUNK = 512  # files a work item of indexing

SCHEMA = pa.schema(
    [
        ("path", pa.large_string()),
        ("label", pa.int32()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("bytes", pa.int64()),
        ("checksum", pa.uint64()),
    ]
)
PACKED_SCHEMA = SCHEMA.append(pa.field("shard", pa.int32())).append(pa.field("offset", pa.int64()))
EXCLUDE = "exclude.txt"  # one path a line; what follows a tab is the reason


def checksum(data: bytes | np.ndarray) -> int:
    """64 bits of BLAKE2b of a file's content."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


class Manifest:
    """A manifest file, opened. Columns are read-only numpy arrays of shape (N,)."""

    def __init__(self, path: Path):
        self.path = Path(path)
        try:
            self.table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
            self.header = json.loads(self.table.schema.metadata[b"hpc_lbsgd"])
        except (pa.ArrowInvalid, OSError, KeyError, TypeError) as problem:
            raise RequestError(f"{path}: not a manifest ({problem}); make one with: hpc-lbsgd data index DIR") from None
        self.root = (self.path.parent / self.header["root"]).resolve()
        self.classes: list[str] = self.header["classes"]
        self.excluded: list[str] = []
        if unwanted := read_excluded(self.path.parent):
            gone = pc.is_in(self.table.column("path"), value_set=pa.array(sorted(unwanted), pa.large_string()))
            self.excluded = self.table.filter(gone).column("path").to_pylist()
            if self.excluded:
                self.table = self.table.filter(pc.invert(gone)).combine_chunks()

    @property
    def shards(self) -> list[dict]:
        """Names (below root), bytes and checksums of the tar files; empty for image files."""
        return self.header.get("shards", [])

    @property
    def raw_channels(self) -> int | None:
        """1 or 3 where samples are pixels, not encoded images."""
        return self.header.get("raw_channels")

    def __len__(self) -> int:
        return self.table.num_rows

    def _column(self, name: str) -> np.ndarray:
        return self.table.column(name).to_numpy()

    @cached_property
    def labels(self) -> np.ndarray:
        return self._column("label")

    @cached_property
    def widths(self) -> np.ndarray:
        return self._column("width")

    @cached_property
    def heights(self) -> np.ndarray:
        return self._column("height")

    @cached_property
    def sizes(self) -> np.ndarray:
        return self._column("bytes")

    @cached_property
    def checksums(self) -> np.ndarray:
        return self._column("checksum")

    @cached_property
    def shard_of(self) -> np.ndarray:
        return self._column("shard")

    @cached_property
    def offsets(self) -> np.ndarray:
        return self._column("offset")

    def key(self, index: int) -> str:
        """A sample's path as the manifest has it."""
        return self.table.column("path")[int(index)].as_py()

    def file(self, index: int) -> str:
        """Where one sample lies, for people: its absolute path, or its shard's with the sample's own behind a colon."""
        if self.shards:
            return f"{self.root / self.shards[self.shard_of[index]]['name']}:{self.key(index)}"
        return os.path.join(self.root, self.key(index))

    @cached_property
    def fingerprint(self) -> str:
        """What the data is, wherever it lies: names, labels, sizes and checksums of all samples."""
        if not self.excluded:
            return self.header["fingerprint"]
        left_out = json.dumps(self.excluded)
        return hashlib.sha256(f"{self.header['fingerprint']} without {left_out}".encode()).hexdigest()

    def check_files(self) -> None:
        """Refuse a manifest whose files are gone or have another size. Looks at all shards, or all files up to
        100,000, else at that many chosen at random; content is `data verify`'s matter."""
        if self.shards:
            expected = [(str(self.root / s["name"]), s["bytes"]) for s in self.shards]
        else:
            chosen = range(len(self))
            if len(self) > FILES_CHECKED_AT_START:
                chosen = random.Random(0).sample(chosen, FILES_CHECKED_AT_START)
            expected = ((self.file(i), int(self.sizes[i])) for i in chosen)
        problems = []
        for path, size in expected:
            try:
                found = os.stat(path).st_size
            except OSError:
                problems.append(f"{path}: missing")
                continue
            if found != size:
                problems.append(f"{path}: {found} bytes, the manifest says {size}")
        if problems:
            again = "pack or copy them again" if self.shards else f"index again (hpc-lbsgd data index {self.root})"
            raise RequestError(f"{self.path} no longer matches its files; {again}:\n{listed(problems)}")


def read_excluded(folder: Path) -> set[str]:
    """Paths that `exclude.txt` in a folder names; none where it is not there."""
    try:
        lines = (folder / EXCLUDE).read_text().splitlines()
    except FileNotFoundError:
        return set()
    return {line.split("\t")[0] for line in lines if line.strip()}


def listed(problems: list[str]) -> str:
    lines = [f"  {p}" for p in problems[:NAMED_AT_MOST]]
    if len(problems) > NAMED_AT_MOST:
        lines.append(f"  and {len(problems) - NAMED_AT_MOST} more")
    return "\n".join(lines)


def find(path: str | os.PathLike) -> Path:
    """The manifest file that `path` (a manifest, or a folder that has one) means; refuses what is neither."""
    path = Path(path)
    if path.is_dir():
        if (path / FILE_NAME).exists():
            return path / FILE_NAME
        raise RequestError(f"{path} has no {FILE_NAME}; make one with: hpc-lbsgd data index {path}")
    if not path.exists():
        raise RequestError(f"{path}: no such folder or manifest")
    return path


def is_plain_folder(path: str | os.PathLike) -> bool:
    """A folder of images that was not indexed yet."""
    return Path(path).is_dir() and not (Path(path) / FILE_NAME).exists()


# ---------------------------------------------------------------- indexing


def scan(root: Path) -> tuple[list[str], list[str], list[int]]:
    """(classes, relative paths, labels) of an image-folder tree: one folder a class, any depth below it."""
    if not root.is_dir():
        raise RequestError(f"{root}: no such folder")
    classes = sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith("."))
    if not classes:
        raise RequestError(f"{root}: no class folders in it; expected {root}/CLASS/IMAGE")
    paths, labels = [], []
    for label, name in enumerate(classes):
        found = []
        for folder, folders, files in os.walk(root / name):
            folders[:] = [f for f in folders if not f.startswith(".")]
            found += [
                os.path.relpath(os.path.join(folder, f), root)
                for f in files
                if os.path.splitext(f)[1].lower() in SUFFIXES and not f.startswith(".")
            ]
        if not found:
            raise RequestError(f"{root / name}: class {name!r} has no images ({', '.join(sorted(SUFFIXES))})")
        paths += sorted(found)
        labels += [label] * len(found)
    return classes, paths, labels


def has_end(image_format: str | None, data: bytes) -> bool:
    """The format's end marker is there. PIL does not miss the last bytes of a PNG or JPEG."""
    if image_format == "JPEG":
        return data.rfind(b"\xff\xd9") > data.rfind(b"\xff\xda")  # end of image, after the last start of scan
    if image_format == "PNG":
        return b"IEND\xaeB`\x82" in data
    return True


class Facts(NamedTuple):
    """What decoding an image says of it."""

    width: int
    height: int
    format: str  # JPEG, PNG ...
    mode: str  # RGB, L, CMYK, I;16 ... (Pillow's names)


def decode(data: bytes) -> Facts:
    """Decode an image to its last row. Raises ValueError with what is wrong with it."""
    import io

    from PIL import Image

    if not len(data):
        raise ValueError("empty file")
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.verify()  # chunk checksums, where the format has them
        if not has_end(image.format, data):
            raise ValueError("image file is truncated (no end marker)")
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return Facts(image.width, image.height, image.format, image.mode)
    except Exception as problem:  # PIL raises many kinds; each means: not usable as an image
        raise ValueError(str(problem)) from None


def examine(root: str, paths: list[str]) -> list[tuple[int, int, int, int] | str]:
    """For each file (width, height, bytes, checksum), or a sentence about what is wrong with it.

    Every image is decoded to its last row: a truncated file is found here and not at hour three.
    """
    results = []
    for path in paths:
        try:
            with open(os.path.join(root, path), "rb") as f:
                data = f.read()
            facts = decode(data)
            results.append((facts.width, facts.height, len(data), checksum(data)))
        except (OSError, ValueError) as problem:
            results.append(str(problem))
    return results


def index(root: str | os.PathLike, out: str | os.PathLike | None = None, processes: int | None = None) -> Manifest:
    """Write the manifest of an image-folder tree (default: ROOT/manifest.arrow) and return it, opened.

    Raises RequestError for a missing folder, an empty class, and images that do not decode (listed by name).
    """
    root = Path(root)
    out = Path(out) if out else root / FILE_NAME
    classes, paths, labels = scan(root)
    excluded = read_excluded(root)
    if excluded:
        kept = [i for i, path in enumerate(paths) if path not in excluded]
        paths, labels = [paths[i] for i in kept], [labels[i] for i in kept]
    chunks = [paths[i : i + CHUNK] for i in range(0, len(paths), CHUNK)]
    rows: list = []
    processes = min(processes or len(os.sched_getaffinity(0)), len(chunks))
    with tqdm(total=len(paths), desc=f"indexing {root}", unit="image", disable=None) as bar:

        def add(results):
            rows.extend(results)
            bar.update(len(results))

        if processes == 1:
            for chunk in chunks:
                add(examine(str(root), chunk))
        else:
            with Pool(processes) as pool:
                for results in pool.map(examine, [str(root)] * len(chunks), chunks):
                    add(results)
    problems = [f"{root / p}: {r}" for p, r in zip(paths, rows, strict=True) if isinstance(r, str)]
    if problems:
        raise RequestError(
            f"{len(problems)} of {len(paths)} images cannot be read; mend or remove them, or have them left out "
            f"(hpc-lbsgd data verify {root} --exclude), then index again:\n{listed(problems)}"
        )
    write(out, root, classes, paths, labels, rows)
    return Manifest(out)


def write(
    out: Path,
    root: Path,
    classes: list[str],
    paths: list[str],
    labels: list[int],
    rows: list,
    places: list[tuple[int, int]] | None = None,
    shards: list[dict] | None = None,
) -> None:
    """Write a manifest file, whole or not at all. places: (shard, offset) of each sample inside `shards`."""
    width, height, size, check = (list(c) for c in zip(*rows, strict=True))
    digest = hashlib.sha256(json.dumps(classes).encode())
    for row in zip(paths, labels, size, check, strict=True):
        digest.update(repr(row).encode())
    # resolved: a root given through a link stays right when seen from the manifest's real folder
    relative = os.path.relpath(root.resolve(), out.parent.resolve())
    header = {"root": relative, "classes": classes, "fingerprint": digest.hexdigest()}
    columns, schema = [paths, labels, width, height, size, check], SCHEMA
    if places is not None:
        header["shards"] = shards
        columns, schema = [*columns, *(list(c) for c in zip(*places, strict=True))], PACKED_SCHEMA
    table = pa.table(columns, schema=schema.with_metadata({"hpc_lbsgd": json.dumps(header)})).combine_chunks()
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        os.replace(temporary, out)
    except OSError as problem:
        temporary.unlink(missing_ok=True)
        raise RequestError(
            f"cannot write {out}: {problem.strerror or problem}; choose another place with --out"
        ) from None


def subset(source: Manifest, out: Path, count: int, seed: int = 0) -> Manifest:
    """Write a manifest of `count` samples of `source`, chosen at random and kept in its order; files stay in place."""
    chosen = np.sort(np.random.default_rng(seed).permutation(len(source))[:count])
    columns = source.table.take(chosen).to_pydict()
    facts = list(zip(*(columns[name] for name in ("width", "height", "bytes", "checksum")), strict=True))
    places = list(zip(columns["shard"], columns["offset"], strict=True)) if source.shards else None
    write(out, source.root, source.classes, columns["path"], columns["label"], facts, places, source.shards)
    return Manifest(out)

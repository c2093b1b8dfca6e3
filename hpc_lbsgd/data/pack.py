"""`data pack`: a data set as a few tar shards with an index, for file systems that small files would kill.

    OUT/shard-000000.tar ...   000000042.jpg, .cls and its fields in .json, sample after sample: a WebDataset
    OUT/classes.txt            names of the classes, a line each (labels.listing_of)
    OUT/manifest.arrow         where each sample lies: shard, offset, bytes; written last
    OUT/.parts/                while packing: who packs, and what is in the shards that are whole

Shards are written in parallel, each under a temporary name until it is whole, so that a killed pack goes on where it
was. A process holds one image at a time.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import socket
import tarfile
from concurrent.futures import as_completed
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa

from hpc_lbsgd import owner, progress
from hpc_lbsgd.data import fields, labels
from hpc_lbsgd.data import manifest as manifests
from hpc_lbsgd.data.carried import Carried, suffix_of
from hpc_lbsgd.data.encode import Encoding, encode
from hpc_lbsgd.data.manifest import PACKED_SCHEMA, PARTS, Manifest, checksum
from hpc_lbsgd.data.parts import Share
from hpc_lbsgd.data.pool import Pool
from hpc_lbsgd.data.storage import SampleError, open_storage
from hpc_lbsgd.errors import RequestError, RunError
from hpc_lbsgd.records import sync_folder, write_atomically

TAR_BLOCK = 512
ROWS_TOGETHER = 20_000_000  # about 2 GB while they are written


class Hashed:
    """A file being written, and the checksum of what was written."""

    def __init__(self, file):
        self.file, self.digest, self.position = file, hashlib.blake2b(digest_size=8), 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.position += len(data)
        return self.file.write(data)

    def tell(self) -> int:
        return self.position


def pack_shard(source: str, out: str, number: int, first: int, last: int, encoding: Encoding) -> int:
    """Write shard `number` with samples first..last-1 of a manifest, and its part of the index; returns its samples.

    Raises RunError that names the sample, or the place that cannot be written.
    """
    m = Manifest(Path(source))
    storage, folder = open_storage(m), Path(out)
    name = f"shard-{number:06d}.tar"
    # a name of its own: where a pack was killed, its workers may still be at the shard that they had begun
    temporary = folder / f".{name}.{socket.gethostname()}.{os.getpid()}.writing"
    rows: dict[str, list] = {field: [] for field in PACKED_SCHEMA.names}
    carried = Carried(m, storage, range(first, last), encoding)
    try:
        with open(temporary, "wb") as file:
            hashed = Hashed(file)
            with tarfile.open(fileobj=hashed, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for sample in range(first, last):
                    data = storage.content(sample).tobytes()
                    if checksum(data) != int(m.checksums[sample]):
                        raise SampleError(sample, f"{m.file(sample)} changed since it was indexed; index again")
                    width, height = int(m.widths[sample]), int(m.heights[sample])
                    orientation = None if m.orientations is None else int(m.orientations[sample])
                    stem, suffix = os.path.splitext(m.stored_key(sample))
                    if encoding.kind != "keep":
                        try:
                            data, width, height, orientation = encode(data, encoding)
                        except ValueError as problem:
                            raise SampleError(sample, f"{m.file(sample)}: cannot be decoded ({problem})") from None
                        suffix = suffix_of(encoding)
                    label = int(m.labels[sample])
                    add(tar, f"{sample:09d}{suffix.lower()}", data)
                    offset = hashed.position - padded(len(data))
                    if m.classes:
                        add(tar, f"{sample:09d}.cls", str(label).encode())
                    for end, beside in carried.files(sample, width, height):
                        add(tar, f"{sample:09d}{end}", beside)
                        carried.offsets.append(hashed.position - padded(len(beside)))
                    described = (width, height, len(data), checksum(data), orientation)
                    row = (stem + suffix, label, *described, number, offset)
                    for field, value in zip(PACKED_SCHEMA.names, row, strict=True):
                        rows[field].append(value)
            file.flush()
            os.fsync(file.fileno())
        facts = {"name": name, "bytes": temporary.stat().st_size, "checksum": hashed.digest.hexdigest()}
        os.replace(temporary, folder / name)
        sync_folder(folder)
        table = manifests.with_columns(pa.table(rows, schema=PACKED_SCHEMA), carried.table())
        write_part(folder / PARTS / f"{number:06d}.arrow", table, facts)
    except OSError as problem:
        temporary.unlink(missing_ok=True)
        raise RunError(
            f"cannot write {folder / name}: {problem.strerror or problem}. Whole shards are kept: free some space and "
            "start the same command again"
        ) from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return last - first


def padded(size: int) -> int:
    return -(-size // TAR_BLOCK) * TAR_BLOCK


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add a member that depends on its content alone: no times, no owners."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def write_part(path: Path, table: pa.Table, facts: dict) -> None:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema.with_metadata({"shard": json.dumps(facts)})) as writer:
        writer.write_table(table)
    write_atomically(path, sink.getvalue().to_pybytes())


def read_part(folder: Path, number: int) -> tuple[pa.Table, dict] | None:
    """A shard's rows and facts, if it is whole: its part is there, and the file has the size that the part says."""
    path = folder / PARTS / f"{number:06d}.arrow"
    try:
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_file(source).read_all()
        facts = json.loads(table.schema.metadata[b"shard"])
        return (table, facts) if (folder / facts["name"]).stat().st_size == facts["bytes"] else None
    except (OSError, pa.ArrowInvalid, KeyError, TypeError):
        return None


def cut(m: Manifest, encoding: Encoding, shard_bytes: int) -> list[tuple[int, int]]:
    """(first, last) of each shard: as many samples as are expected to fill it. A function of the source alone, so
    that a pack that goes on cuts as before."""
    if encoding.kind == "raw":
        sizes = expected_pixels(m, encoding) * encoding.channels * (1 + len(m.of_kind("image")))
    else:
        sizes = np.asarray(m.sizes)
    for name in m.of_kind("bytes") if encoding.kind == "raw" else m.of_kind("bytes", "image"):
        sizes = sizes + np.asarray(m.of_file(name, "bytes"))
    ends = np.cumsum(sizes + 3 * TAR_BLOCK)
    cuts, first = [], 0
    while first < len(m):
        before = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + shard_bytes, side="right")))
        cuts.append((first, last))
        first = last
    return cuts


def expected_pixels(m: Manifest, encoding: Encoding) -> np.ndarray:
    width, height = np.asarray(m.widths, np.int64), np.asarray(m.heights, np.int64)
    if not (encoding.short_side or encoding.long_side):
        return width * height
    side = np.minimum(width, height) if encoding.short_side else np.maximum(width, height)
    shrink = np.minimum(1.0, (encoding.short_side or encoding.long_side) / side.astype(np.float64))
    return (width * height * shrink**2).astype(np.int64) + 1


def pack(
    source: str | os.PathLike, out: str | os.PathLike, encoding: Encoding, shard_mb: float, processes: int | None = None
) -> Manifest:
    """Write the shards that are missing, then the manifest; returns it, opened.

    Raises RequestError for a folder that holds something else, RunError for a sample or a disk that failed.
    """
    m, out = Manifest(manifests.find(source)), Path(out)
    request = request_of(m, encoding, shard_mb)
    target = out / manifests.FILE_NAME
    if not same_request(out, target, request):
        held = owner.take(out / PARTS, name=str(out))  # two at once would write the same shards
        try:
            shares = sorted((out / PARTS).glob("part-*-of-*"))
            for folder in shares:
                owner.check(folder)
            if not same_request(out, target, request):  # as it is now that it stands still
                write_atomically(out / PARTS / "request.json", json.dumps(request))
                cuts = cut(m, encoding, int(shard_mb * 1e6))
                write_shards(m, out, list(enumerate(cuts)), encoding, processes)
                assemble(m, out, len(cuts), encoding, request)
                parts = out / PARTS
                for path in (*out.glob(".shard-*.writing"), *parts.glob("*.arrow"), parts / "request.json"):
                    path.unlink(missing_ok=True)
                for folder in shares:  # of parts that were killed
                    shutil.rmtree(folder, ignore_errors=True)
        finally:
            held.release()  # which removes the folder where it is empty
    return Manifest(target)


def pack_share(
    source: str | os.PathLike,
    out: str | os.PathLike,
    encoding: Encoding,
    shard_mb: float,
    processes: int | None,
    share: Share,
) -> int:
    """Write a part of the shards, at the same time as others write theirs; returns how many images they have. `pack`
    makes one set of them when all have ended. Raises as `pack` does."""
    m, out = Manifest(manifests.find(source)), Path(out)
    request = request_of(m, encoding, shard_mb)
    target = out / manifests.FILE_NAME
    if same_request(out, target, request):
        return 0
    held = owner.take(share_folder(out, share), name=f"{out}, part {share}")
    try:
        owner.check(out / PARTS)  # a pack of all that is under way
        if not same_request(out, target, request):
            write_atomically(out / PARTS / "request.json", json.dumps(request))
        shards = share.of(list(enumerate(cut(m, encoding, int(shard_mb * 1e6)))))
        write_shards(m, out, shards, encoding, processes)
    finally:
        held.release()
    return sum(last - first for _, (first, last) in shards)


def share_folder(out: Path, share: Share) -> Path:
    return out / PARTS / f"part-{share.number}-of-{share.count}"


def request_of(m: Manifest, encoding: Encoding, shard_mb: float) -> dict:
    return {"source": m.fingerprint, "shard_mb": shard_mb, "encoding": asdict(encoding)}


def same_request(out: Path, target: Path, request: dict) -> bool:
    """The same set was packed here before. False where it was begun, or nothing is there; refuses anything else."""
    if target.exists():
        if Manifest(target).header.get("packed") == request:
            return True
        raise RequestError(f"{out}: another set is packed there already; choose another folder, or remove that one")
    begun = out / PARTS / "request.json"
    if begun.exists():
        if json.loads(begun.read_text()) == request:
            return False
        raise RequestError(
            f"{out}: a pack of another set or with other options was begun there; give the same ones, or remove it"
        )
    if out.exists() and any(e.name != PARTS for e in os.scandir(out)):
        raise RequestError(f"{out}: is not empty; choose another folder")
    return False


def write_shards(m: Manifest, out: Path, shards: list, encoding: Encoding, processes: int | None) -> None:
    """shards: (number, (first sample, behind the last))."""
    missing = [(i, first, last) for i, (first, last) in shards if not read_part(out, i)]
    total = sum(last - first for _, (first, last) in shards)
    done = total - sum(last - first for _, first, last in missing)
    processes = min(processes or len(os.sched_getaffinity(0)), max(1, len(missing)))
    with progress.bar(total=total, initial=done, desc=f"packing {out}", unit="image") as bar:
        if processes == 1:
            for shard in missing:
                bar.update(pack_shard(str(m.path), str(out), *shard, encoding))
            return
        with Pool(processes) as pool:
            waiting = {pool.submit(pack_shard, str(m.path), str(out), *shard, encoding) for shard in missing}
            for future in as_completed(waiting):
                bar.update(future.result())


def assemble(m: Manifest, out: Path, shards: int, encoding: Encoding, request: dict) -> None:
    """One manifest from the shards' parts, whole or not at all. Its rows lie together, up to ROWS_TOGETHER: what lies
    in pieces would be copied by every rank that opens it."""
    digest = hashlib.sha256(json.dumps(m.classes).encode())
    facts = []
    for number in range(shards):
        table, shard = read_part(out, number)
        facts.append(shard)
        columns = [table.column(name).to_pylist() for name in ("path", "label", "bytes", "checksum")]
        for row in zip(*columns, strict=True):
            digest.update(repr(row).encode())
        if m.own_fields:
            digest.update(manifests.content_digest(fields.content_of(table), {}).encode())
    # bytes that were kept are the same data wherever they lie; the rows are then the source's own
    fingerprint = m.fingerprint if encoding.kind == "keep" else digest.hexdigest()
    header = {"root": ".", "classes": m.classes, "fingerprint": fingerprint, "shards": facts, "packed": request}
    header |= {key: m.header[key] for key in ("escaped", "decoders", "masks") if key in m.header}
    if encoding.kind == "raw":
        header["raw_channels"] = encoding.channels
    write_atomically(out / "classes.txt", labels.listing_of(m.classes))
    whole = pa.concat_tables(read_part(out, number)[0].replace_schema_metadata() for number in range(shards))
    header["digest"] = manifests.content_digest(whole, header)
    schema = whole.schema.with_metadata({"hpc_lbsgd": json.dumps(header)})
    temporary = out / f".{manifests.FILE_NAME}.writing"
    with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        waiting: list[pa.Table] = []
        for number in range(shards):
            waiting.append(read_part(out, number)[0].cast(schema))
            if number == shards - 1 or sum(map(len, waiting)) >= ROWS_TOGETHER:
                writer.write_table(pa.concat_tables(waiting).combine_chunks())
                waiting = []
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, out / manifests.FILE_NAME)
    sync_folder(out)

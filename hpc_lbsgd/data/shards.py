"""Tar shards with an index, for file systems that small files would kill: how they are written, whatever is in them.

    OUT/shard-000000.tar ...   000000042.jpg, .cls and its fields in .json, sample after sample: a WebDataset
    OUT/classes.txt            names of the classes, a line each (labels.listing_of)
    OUT/manifest.arrow         where each sample lies: shard, offset, bytes; written last
    OUT/.parts/                while packing: who packs, and what is in the shards that are whole

Shards are written in parallel, each under a temporary name until it is whole, so that a killed pack goes on where it
was.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import socket
import tarfile
from collections.abc import Callable
from concurrent.futures import as_completed
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from hpc_lbsgd import owner, progress
from hpc_lbsgd.data import fields, labels
from hpc_lbsgd.data import manifest as manifests
from hpc_lbsgd.data.manifest import PARTS, Manifest
from hpc_lbsgd.data.parts import Share
from hpc_lbsgd.data.pool import Pool
from hpc_lbsgd.errors import RequestError, RunError
from hpc_lbsgd.records import sync_folder, write_atomically

TAR_BLOCK = 512
ROWS_TOGETHER = 20_000_000  # about 2 GB while they are written

Put = Callable[[str, bytes], int]  # a member's name and content; where that lies in the shard


class Contents(Protocol):
    """What is packed. It travels to the processes that write shards."""

    def request(self) -> dict:
        """What tells it from other contents: a pack that was begun with it goes on with it alone."""

    def cuts(self, shard_bytes: float) -> list[tuple[int, int]]:
        """(first, behind the last) sample of each shard: a function of the source alone, so that a pack that goes on
        cuts as before."""

    def write(self, number: int, first: int, last: int, put: Put) -> pa.Table:
        """Write the samples of a shard of this number; returns their rows of the manifest."""

    def header(self) -> dict:
        """Of the manifest: `classes`, and `fingerprint` where it is known without looking at the shards."""


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


def write_shard(contents: Contents, out: str, number: int, first: int, last: int) -> int:
    """Write shard `number` with samples first..last-1, and its part of the index; returns its samples.

    Raises RunError that names the sample, or the place that cannot be written.
    """
    folder, name = Path(out), f"shard-{number:06d}.tar"
    # a name of its own: where a pack was killed, its workers may still be at the shard that they had begun
    temporary = folder / f".{name}.{socket.gethostname()}.{os.getpid()}.writing"
    try:
        with open(temporary, "wb") as file:
            hashed = Hashed(file)
            with tarfile.open(fileobj=hashed, mode="w", format=tarfile.USTAR_FORMAT) as tar:

                def put(member: str, data: bytes) -> int:
                    add(tar, member, data)
                    return hashed.position - padded(len(data))

                table = contents.write(number, first, last, put)
            file.flush()
            os.fsync(file.fileno())
        facts = {"name": name, "bytes": temporary.stat().st_size, "checksum": hashed.digest.hexdigest()}
        os.replace(temporary, folder / name)
        sync_folder(folder)
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


def pack(contents: Contents, out: str | os.PathLike, shard_mb: float, processes: int | None = None) -> Manifest:
    """Write the shards that are missing, then the manifest; returns it, opened.

    Raises RequestError for a folder that holds something else, RunError for a sample or a disk that failed.
    """
    out, request = Path(out), contents.request() | {"shard_mb": shard_mb}
    target = out / manifests.FILE_NAME
    if not same_request(out, target, request):
        held = owner.take(out / PARTS, name=str(out))  # two at once would write the same shards
        try:
            shares = sorted((out / PARTS).glob("part-*-of-*"))
            for folder in shares:
                owner.check(folder)
            if not same_request(out, target, request):  # as it is now that it stands still
                write_atomically(out / PARTS / "request.json", json.dumps(request))
                cuts = contents.cuts(shard_mb * 1e6)
                write_shards(contents, out, list(enumerate(cuts)), processes)
                assemble(contents, out, len(cuts), request)
                parts = out / PARTS
                for path in (*out.glob(".shard-*.writing"), *parts.glob("*.arrow"), parts / "request.json"):
                    path.unlink(missing_ok=True)
                for folder in shares:  # of parts that were killed
                    shutil.rmtree(folder, ignore_errors=True)
        finally:
            held.release()  # which removes the folder where it is empty
    return Manifest(target)


def pack_share(contents: Contents, out: Path, shard_mb: float, processes: int | None, share: Share) -> int:
    """Write a part of the shards, at the same time as others write theirs; returns how many samples they have. `pack`
    makes one set of them when all have ended. Raises as `pack` does."""
    request = contents.request() | {"shard_mb": shard_mb}
    target = out / manifests.FILE_NAME
    if same_request(out, target, request):
        return 0
    held = owner.take(share_folder(out, share), name=f"{out}, part {share}")
    try:
        owner.check(out / PARTS)  # a pack of all that is under way
        if not same_request(out, target, request):
            write_atomically(out / PARTS / "request.json", json.dumps(request))
        shards = share.of(list(enumerate(contents.cuts(shard_mb * 1e6))))
        write_shards(contents, out, shards, processes)
    finally:
        held.release()
    return sum(last - first for _, (first, last) in shards)


def share_folder(out: Path, share: Share) -> Path:
    return out / PARTS / f"part-{share.number}-of-{share.count}"


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


def write_shards(contents: Contents, out: Path, shards: list, processes: int | None) -> None:
    """shards: (number, (first sample, behind the last))."""
    missing = [(i, first, last) for i, (first, last) in shards if not read_part(out, i)]
    total = sum(last - first for _, (first, last) in shards)
    done = total - sum(last - first for _, first, last in missing)
    processes = min(processes or len(os.sched_getaffinity(0)), max(1, len(missing)))
    with progress.bar(total=total, initial=done, desc=f"packing {out}", unit="sample") as bar:
        if processes == 1:
            for shard in missing:
                bar.update(write_shard(contents, str(out), *shard))
            return
        with Pool(processes) as pool:
            waiting = {pool.submit(write_shard, contents, str(out), *shard) for shard in missing}
            for future in as_completed(waiting):
                bar.update(future.result())


def assemble(contents: Contents, out: Path, shards: int, request: dict) -> None:
    """One manifest from the shards' parts, whole or not at all. Its rows lie together, up to ROWS_TOGETHER: what lies
    in pieces would be copied by every rank that opens it."""
    known = contents.header()
    digest = hashlib.sha256(json.dumps(known["classes"]).encode())
    facts = []
    for number in range(shards):
        table, shard = read_part(out, number)
        facts.append(shard)
        columns = [table.column(name).to_pylist() for name in ("path", "label", "bytes", "checksum")]
        for row in zip(*columns, strict=True):
            digest.update(repr(row).encode())
        if fields.columns_of(table).column_names:
            digest.update(manifests.content_digest(fields.content_of(table), {}).encode())
    header = {"root": ".", "fingerprint": digest.hexdigest(), "shards": facts, "packed": request} | known
    write_atomically(out / "classes.txt", labels.listing_of(known["classes"]))
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

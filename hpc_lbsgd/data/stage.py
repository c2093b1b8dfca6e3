"""Node-local copies of packed sets (`machine.stage_dir`): copied once a node, checked, kept for the next job.

STAGE_DIR/<user number>-<16 digits of what is in the shards>/    the user's alone
    shard-000000.tar ...   each appears when it is whole
    manifest.arrow         appears last
    staged.json            what is whole, with the checksum that was verified and the file that it was verified of
    lock                   held while copying: two jobs on a node copy once
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from pathlib import Path

from hpc_lbsgd import progress
from hpc_lbsgd.data.manifest import FILE_NAME, Manifest
from hpc_lbsgd.data.names import EXCLUDE, lists_of, together
from hpc_lbsgd.errors import RequestError, RunError
from hpc_lbsgd.private import check_room, identity, make_private
from hpc_lbsgd.records import sync_folder, write_atomically

BLOCK = 1 << 22
JOURNAL = "staged.json"
KEY = "machine.stage_dir"


def folder_of(manifest: Manifest, stage_dir: str | os.PathLike) -> Path:
    """Where a set is staged; refuses a set of single files."""
    if not manifest.shards:
        raise RequestError(
            f"machine.stage_dir = {stage_dir}: {manifest.path} lists single image files; stage a packed set "
            f"(hpc-lbsgd data pack {manifest.path} OUT)"
        )
    return Path(stage_dir) / f"{os.geteuid()}-{digest_of(manifest)}"


def digest_of(manifest: Manifest) -> str:
    """Of the shards, the manifest's file as it was written, and which samples are left out: two packs of one set
    differ."""
    there = manifest.path.stat()  # its rows may be too many to be read at each start
    digest = hashlib.sha256(f"{json.dumps(manifest.header)} {there.st_size} {there.st_mtime_ns}".encode())
    for shard in manifest.shards:
        if not shard["checksum"]:  # tar files of others: known by where they are, and when they were written
            path = manifest.root / shard["name"]
            digest.update(f"{path.resolve()} {path.stat().st_mtime_ns}".encode())
    digest.update(together(lists_of(manifest.path)))
    return digest.hexdigest()[:16]


def stage(manifest: Manifest, stage_dir: str | os.PathLike, show: bool = False) -> Manifest:
    """Copy what is missing, check it, and return the manifest of the copy. One process a node calls it.

    Raises RunError where the copy differs from what was packed, or the disk is full; what is whole stays.
    """
    target = folder_of(manifest, stage_dir)
    try:
        make_private(target, KEY)
        with open(target / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            _copy_missing(manifest, target, show)
    except OSError as problem:
        raise RunError(f"machine.stage_dir: cannot write {target}: {problem.strerror or problem}") from None
    return Manifest(target / FILE_NAME)


def _copy_missing(manifest: Manifest, target: Path, show: bool) -> None:
    whole = _journal(target)
    missing = [s for s in manifest.shards if not _is_whole(target, s, whole)]
    total = sum(s["bytes"] for s in missing)
    check_room(target, total, KEY)
    with progress.bar(total=total, show=show, desc=f"staging to {target}", unit="B", unit_scale=True) as bar:
        for shard in missing:
            copied = _copy(manifest.root / shard["name"], target, bar)
            if copied != shard["checksum"] and shard["checksum"]:
                (target / shard["name"]).unlink()
                raise RunError(
                    f"{manifest.root / shard['name']}: not the bytes that were packed (checksum {copied}, packed "
                    f"{shard['checksum']}); pack it again, or look closer with hpc-lbsgd data verify {manifest.path}"
                )
            whole[shard["name"]] = {"checksum": copied, "file": identity(target / shard["name"])}
            write_atomically(target / JOURNAL, json.dumps(whole))
    if excluded := together(lists_of(manifest.path)):
        write_atomically(target / EXCLUDE, excluded)
    write_moved(manifest, target / FILE_NAME, ".")


def _journal(target: Path) -> dict:
    try:
        return json.loads((target / JOURNAL).read_text())
    except (OSError, ValueError):
        return {}


def _is_whole(target: Path, shard: dict, whole: dict) -> bool:
    try:
        known = whole[shard["name"]]
        return known["checksum"] == (shard["checksum"] or known["checksum"]) and known["file"] == identity(
            target / shard["name"]
        )
    except (OSError, KeyError, TypeError):
        return False


def _copy(source: Path, target: Path, bar) -> str:
    """Copy one file under a temporary name, read the copy back, and let it appear; returns its checksum."""
    temporary = target / f".{source.name}.copying"
    read = hashlib.blake2b(digest_size=8)
    try:
        with open(source, "rb") as old, open(temporary, "wb") as new:
            while block := old.read(BLOCK):
                read.update(block)
                new.write(block)
                bar.update(len(block))
            new.flush()
            os.fsync(new.fileno())
        written = hashlib.blake2b(digest_size=8)
        with open(temporary, "rb") as copy:
            while block := copy.read(BLOCK):
                written.update(block)
        if written.digest() != read.digest():
            raise RunError(f"{temporary}: not what was written to it; the disk under machine.stage_dir is faulty")
        os.replace(temporary, target / source.name)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return read.hexdigest()


def write_moved(manifest: Manifest, out: Path, root: str) -> None:
    """The set's manifest, where its shards lie elsewhere: whole, or not at all."""
    import pyarrow as pa

    schema = manifest.table.schema.with_metadata({"hpc_lbsgd": json.dumps(manifest.header | {"root": root})})
    temporary = out.with_name(f".{out.name}.copying")
    with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(manifest.table.cast(schema))
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, out)
    sync_folder(out.parent)

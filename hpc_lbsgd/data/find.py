"""Which manifest a path, or an address, means."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

from hpc_lbsgd import urls
from hpc_lbsgd.data.elsewhere import blocks, reach
from hpc_lbsgd.data.manifest import FILE_NAME, Manifest
from hpc_lbsgd.data.names import EXCLUDE, lists_of, together
from hpc_lbsgd.data.reach import AT_START_S, Missing, patiently
from hpc_lbsgd.data.stage import write_moved
from hpc_lbsgd.errors import RequestError, RunError
from hpc_lbsgd.records import write_atomically

COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tzst", ".tar.xz", ".txz", ".tar.bz2", ".tbz2", ".tar.lz4")


def find(path: str | os.PathLike, folder: Path | None = None) -> Path:
    """The manifest file that `path` (a manifest, or a folder that has one, or the address of either) means; refuses
    what is neither. What lies elsewhere is copied to `folder` (default: one that goes when this process ends)."""
    if not urls.is_url(path) and (Path(path) / FILE_NAME).exists():
        return Path(path) / FILE_NAME
    refuse_compressed(path)
    if urls.is_url(path):
        return fetched(path, folder)
    path = Path(path)
    if path.is_dir():
        raise RequestError(f"{path} has no {FILE_NAME}; make one with: hpc-lbsgd data index {path}")
    if not path.exists():
        raise RequestError(f"{path}: no such folder or manifest")
    return path


def refuse_compressed(path: str | os.PathLike) -> None:
    """Raise RequestError for a compressed tar, or a folder with one in it."""
    names = [str(path)] if urls.is_url(path) or not Path(path).is_dir() else os.listdir(Path(path))
    if found := next((name for name in sorted(names) if name.endswith(COMPRESSED)), None):
        raise RequestError(
            f"{path}: {os.path.basename(found)} is compressed: none of its samples can be read without all before it; "
            "uncompress it (gzip -d, zstd -d, xz -d), and index that"
        )


def is_plain_folder(path: str | os.PathLike) -> bool:
    """A folder of images that was not indexed yet."""
    return Path(path).is_dir() and not (Path(path) / FILE_NAME).exists()


def fetched(url: str, folder: Path | None = None) -> Path:
    """The manifest at an address, with the lists beside it, as files; its shards stay where they are."""
    try:
        url = urls.checked(url, "data")
    except ValueError as problem:
        raise RequestError(str(problem)) from None
    base, name = url.rsplit("/", 1) if url.endswith(".arrow") else (url, FILE_NAME)
    if folder is None:
        folder = Path(tempfile.mkdtemp(prefix="hpc-lbsgd-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    there = folder / "there.arrow"
    if not copied(base, name, there):
        raise RequestError(f"{base}/{name}: not there, or not for you; a set that is read from afar has its manifest")
    if lists := [path for path in lists_of(folder / name) if copied(base, path.name, path)]:
        write_atomically(folder / EXCLUDE, together(lists))
    else:
        (folder / EXCLUDE).unlink(missing_ok=True)
    try:
        manifest = Manifest(there)
        manifest.check_content(at_any_size=True)  # it may have been replaced while it came
    except RequestError as problem:
        raise RequestError(f"{base}/{name}: as it came here: {problem}") from None
    if not manifest.shards:
        raise RequestError(f"{base}/{name}: lists single image files; what is read from afar is packed (data pack)")
    root = manifest.header["root"]
    write_moved(manifest, folder / FILE_NAME, root if urls.is_url(root) else base if root == "." else f"{base}/{root}")
    there.unlink()
    return folder / FILE_NAME


def moved(manifest: Manifest, url: str) -> Manifest:
    """The same manifest, of shards at an address."""
    write_moved(manifest, manifest.path, url)
    return Manifest(manifest.path)


def copied(base: str, name: str, to: Path) -> bool:
    """False where it is not there. Raises RequestError where it cannot be had."""
    of, what = reach(base), f"{base}/{name}"
    try:
        size = patiently(lambda: of.facts(name), what, AT_START_S).bytes
        if size is None:
            raise RequestError(f"{what}: its server does not say how large it is")
        write_atomically(to, b"".join(blocks(of, name, size, what, AT_START_S)))
    except Missing:
        return False
    except RunError as problem:
        raise RequestError(str(problem)) from None
    except OSError as problem:
        raise RequestError(f"{to}: cannot be written: {problem.strerror or problem}") from None
    return True

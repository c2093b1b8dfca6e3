"""`bundle`: this environment in one file, which a job unpacks on the disk of each of its nodes (unbundle.py).

A tar that is read from its first byte to its last, which parallel file systems do best; 45,000 files, opened by every
rank, they do worst. First in it, and of a fixed size:

bundle.json    what it holds, and a checksum of all that follows; filled in at the end
then the files as they lie in the environment, and this package where it was installed from elsewhere

Nothing in them is changed. A venv may lie anywhere: Python takes the folder of the pyvenv.cfg beside it (PEP 405).
Console scripts name the old place, and jobs start none: `python -m`. Compiled modules come along, so that no rank
compiles. What a venv links to, the Python that it was made with, must be on the nodes.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import platform
import shutil
import socket
import sys
import sysconfig
import tarfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import hpc_lbsgd
from hpc_lbsgd import origin, progress
from hpc_lbsgd.errors import RequestError, RunError
from hpc_lbsgd.private import identity

FORMAT = 1
HEAD = "bundle.json"
HEAD_BYTES = 4096
BEFORE_SUM = tarfile.BLOCKSIZE + HEAD_BYTES  # bytes that the checksum is not of
BLOCK = 1 << 22
DISK_BLOCK = 4096
CACHES = {".cache", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis"}


@dataclass(frozen=True)
class Bundle:
    """What a bundle holds."""

    python: str  # version
    base: str  # the Python that the environment links to
    environment: str  # where it lay
    program: str  # digest of this package's source
    packages: str  # digest of the names and versions installed
    commit: str | None
    files: int
    bytes: int  # that it takes on a disk
    size: int = 0  # bytes of the file
    content: str = ""  # checksum of what follows in the file
    format: int = FORMAT

    @property
    def checksum(self) -> str:
        """Of all of it."""
        return digest(json.dumps(asdict(self)).encode()).hexdigest()

    def head(self) -> bytes:
        """The file's first member."""
        text = json.dumps(asdict(self) | {"checksum": self.checksum}, indent=1).encode()
        if len(text) > HEAD_BYTES:
            raise RequestError(f"the path of the environment is too long to be written down: {self.environment}")
        info = tarfile.TarInfo(HEAD)
        info.size = HEAD_BYTES
        return info.tobuf(tarfile.GNU_FORMAT) + text.ljust(HEAD_BYTES)


def digest(content: bytes = b""):
    return hashlib.blake2b(content, digest_size=16)


def read(path: Path) -> Bundle:
    """What the bundle says of itself. Raises RequestError where it is none, or damaged so far."""
    with open(path, "rb") as file:
        start = file.read(BEFORE_SUM)
    try:
        said = json.loads(start[tarfile.BLOCKSIZE :])
        checksum = said.pop("checksum")
        found = Bundle(**said)
        whole = (found.format, found.checksum, found.size) == (FORMAT, checksum, path.stat().st_size)
    except (ValueError, TypeError, KeyError, AttributeError):
        whole = False
    if not whole:
        raise RequestError(f"bundle = {path}: no bundle of this version, or damaged; pack it again: make bundle")
    return found


# ---------------------------------------------------------------- packing


def pack(target: Path) -> Bundle:
    """Pack this environment into `target`, whole or not at all.

    Raises RequestError where it cannot be packed, or not to there; RunError where it changes meanwhile.
    """
    prefix = Path(sys.prefix).resolve()
    target = target.absolute()
    if not (prefix / "pyvenv.cfg").is_file():
        raise RequestError(
            f"{prefix} is not made by venv, and would not work in another folder; make one: python -m venv"
        )
    if target.is_dir() or not target.parent.is_dir():
        raise RequestError(f"{target}: {'a folder' if target.is_dir() else f'no folder {target.parent}'}; name a file")
    if target.resolve().is_relative_to(prefix):
        raise RequestError(f"{target}: inside the environment that is packed; name a file elsewhere")
    found = contents(prefix)
    sizes = [os.lstat(source).st_size for source in found.values()]
    on_disk = sum(-(-size // DISK_BLOCK) * DISK_BLOCK for size in sizes)
    free = shutil.disk_usage(target.parent).free
    if on_disk > free:
        raise RunError(f"{target.parent} has {free / 1e9:.1f} GB free, and {on_disk / 1e9:.1f} GB are to be packed")
    base = Path(os.path.realpath(sys.executable))
    if base.is_relative_to(prefix):  # venv --copies
        base = Path(sys.base_prefix, "bin", f"python{sys.version_info.major}.{sys.version_info.minor}")
    what = Bundle(platform.python_version(), str(base), str(prefix), origin.program(), packages(), origin.commit(),
                  len(found), on_disk)  # fmt: skip
    remove_leftovers(target)
    temporary = target.with_name(f".{target.name}.packing-{socket.gethostname()}-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            with progress.bar(total=sum(sizes), desc=f"packing {prefix}", unit="B", unit_scale=True) as bar:
                what = write(file, found, what, bar)
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return what


def contents(prefix: Path) -> dict[str, Path]:
    """The files of an environment and links in it, by their names in the bundle."""
    found = dict(files_below(prefix))
    program = Path(hpc_lbsgd.__file__).resolve().parent
    if not program.is_relative_to(prefix):  # installed with -e, or found by PYTHONPATH
        place = os.path.relpath(os.path.realpath(sysconfig.get_path("purelib")), prefix) + f"/{program.name}"
        found = {name: source for name, source in found.items() if not name.startswith(f"{place}/")}
        found |= {f"{place}/{name}": source for name, source in files_below(program)}
    return dict(sorted(found.items()))


def files_below(root: Path):
    """(name below root, path). pip leaves folders that begin with ~ where it was interrupted."""
    for folder, below, files in os.walk(root):
        links = [name for name in below if os.path.islink(os.path.join(folder, name))]
        below[:] = [name for name in below if name not in CACHES and name not in links and name[0] != "~"]
        for name in [*files, *links]:
            path = Path(folder, name)
            yield path.relative_to(root).as_posix(), path


def outside() -> list[str]:
    """Folders from which this Python imports and which are not packed: --system-site-packages, `pip -e`."""
    here, stdlib = Path(sys.prefix).resolve(), Path(sysconfig.get_path("stdlib")).resolve()
    own = (Path.cwd(), Path(hpc_lbsgd.__file__).resolve().parents[1])
    folders = dict.fromkeys(Path(entry).resolve() for entry in sys.path if os.path.isdir(entry))
    return [
        str(folder)
        for folder in folders
        if not (folder in own or folder.is_relative_to(here))
        and (folder.name.endswith("-packages") or not folder.is_relative_to(stdlib))
    ]


def packages() -> str:
    """Digest of the names and versions of what pip has installed."""
    found = sorted(path.name for path in Path(sysconfig.get_path("purelib")).glob("*.dist-info"))
    return digest("\n".join(found).encode()).hexdigest()


def remove_leftovers(target: Path) -> None:
    """Of packing that was killed here."""
    for path in target.parent.glob(f".{glob.escape(target.name)}.packing-{socket.gethostname()}-*"):
        if not Path("/proc", path.name.rpartition("-")[2]).exists():
            path.unlink()


class Summed:
    """A file that is written, with a checksum of what was."""

    def __init__(self, file):
        self.file, self.sum = file, digest()

    def tell(self) -> int:
        return self.file.tell()

    def write(self, data: bytes) -> int:
        self.sum.update(data)
        return self.file.write(data)


class Watched(io.BufferedReader):
    """A file that is read, and moves a bar."""

    def __init__(self, path: Path, bar):
        super().__init__(io.FileIO(path))
        self.bar = bar

    def read(self, size: int = -1) -> bytes:
        data = super().read(size)
        self.bar.update(len(data))
        return data


def write(file, found: dict[str, Path], what: Bundle, bar) -> Bundle:
    """The bundle's bytes; returns what it is then."""
    file.write(what.head())
    out = Summed(file)
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT, copybufsize=BLOCK) as tar:
        for name, source in found.items():
            before, info = identity(source), tar.gettarinfo(source, name)
            if info is None:  # a socket
                continue
            info.uid = info.gid = 0
            info.uname = info.gname = ""
            if not info.isreg():
                tar.addfile(info)
                continue
            with Watched(source, bar) as content:
                try:
                    tar.addfile(info, content)
                    changed = identity(source) != before
                except OSError as problem:
                    if problem.errno is not None:
                        raise
                    changed = True  # it ended early
            if changed:
                raise RunError(f"{source} changed while it was packed; do it again when nobody installs anything")
    what = replace(what, size=file.tell(), content=out.sum.hexdigest())
    file.seek(0)
    file.write(what.head())
    return what


# ---------------------------------------------------------------- before a job


def out_of_date(path: str) -> str | None:
    """What to tell who submits from the environment that was packed, if it is another one by now."""
    what = read(Path(path))
    if what.environment != str(Path(sys.prefix).resolve()):  # nobody knows
        return None
    now = replace(what, program=origin.program(), packages=packages())
    if now == what:
        return None
    changed = "hpc_lbsgd" if now.program != what.program else "what pip has installed"
    return f"{changed} is another one since {path} was packed, and the job runs what was packed: make bundle"

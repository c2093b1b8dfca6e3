"""Data sets that can be had by name, written as real image files with a manifest."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
import urllib.request
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from hpc_lbsgd import progress
from hpc_lbsgd.data import manifest, tree
from hpc_lbsgd.errors import RequestError, RunError

Reader = Callable[[Path], tuple[np.ndarray, np.ndarray]]  # a folder of files -> images and labels of one part

# ---------------------------------------------------------------- Fashion-MNIST

DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("usr/share/datasets/fashion-mnist")
FASHION_CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot")
FASHION_PARTS = {"train": ("train", 60_000), "test": ("t10k", 10_000)}


def read_idx(path: Path) -> np.ndarray:
    """An array in the IDX format of MNIST's files (big-endian sizes, uint8 values), gzipped or not."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as f:
            data = f.read()
        dimensions = data[3]
        shape = np.frombuffer(data, ">u4", dimensions, offset=4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (OSError, EOFError, zlib.error, IndexError, ValueError) as problem:
        raise RequestError(f"{path}: not a whole IDX file ({problem})") from None


def from_debian(scratch: Path) -> Path | None:
    """Unpack Debian's package into `scratch`, without installing it and without root. None where that fails."""
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        return None
    lists = scratch / "lists"
    (lists / "partial").mkdir(parents=True)
    # package lists of our own: the system's may be empty, and only root may refresh them
    own = ["-o", f"Dir::State::Lists={lists}", "-o", f"Dir::Cache={scratch}", "-o", "APT::Sandbox::User="]
    try:
        subprocess.run(["apt-get", *own, "-q", "update"], check=True, capture_output=True, timeout=120)
        subprocess.run(
            ["apt-get", *own, "-q", "download", DEBIAN_PACKAGE],
            check=True,
            capture_output=True,
            timeout=300,
            cwd=scratch,
        )
        package = next(scratch.glob(f"{DEBIAN_PACKAGE}*.deb"))
        subprocess.run(["dpkg-deb", "-x", str(package), str(scratch)], check=True, capture_output=True, timeout=60)
    except (subprocess.SubprocessError, StopIteration):
        return None
    return scratch / DEBIAN_FOLDER


def from_torchvision(scratch: Path) -> Path:
    from torchvision.datasets import FashionMNIST

    try:
        FashionMNIST(str(scratch), download=True)
    except Exception as problem:  # URL errors, checksum errors: torchvision raises several kinds
        raise RunError(
            f"Fashion-MNIST could not be had: Debian's package {DEBIAN_PACKAGE} is not installed and cannot "
            f"be downloaded, and torchvision says: {problem}. On a machine without network put its four "
            f"files into a folder and name it with --source"
        ) from None
    return scratch / "FashionMNIST" / "raw"


def fashion_mnist(out: Path, source: Path | None = None) -> list[manifest.Manifest]:
    """Write Fashion-MNIST as OUT/{train,test}/CLASS/NNNNN.png (28x28, grey) with a manifest each.

    source: a folder with the four IDX files; else the installed Debian package, that package downloaded, or
    torchvision's download, whichever is there first. A part whose manifest is there is left as it is.
    """

    def files(scratch: Path) -> Path:
        installed = Path("/") / DEBIAN_FOLDER
        return (
            source or (installed if installed.is_dir() else None) or from_debian(scratch) or from_torchvision(scratch)
        )

    names = [f"{i}-{name}" for i, name in enumerate(FASHION_CLASSES)]
    return write_parts(out, names, {part: idx_reader(*known) for part, known in FASHION_PARTS.items()}, files)


def idx_reader(prefix: str, expected: int) -> Reader:
    def read(files: Path) -> tuple[np.ndarray, np.ndarray]:
        arrays = []
        for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
            found = [files / f"{prefix}-{kind}{end}" for end in ("", ".gz")]
            found = [path for path in found if path.exists()]
            if not found:
                raise RequestError(f"--source {files}: no {prefix}-{kind} or {prefix}-{kind}.gz in it")
            arrays.append(read_idx(found[0]))
        images, labels = arrays
        if len(images) != expected or len(labels) != expected:
            raise RequestError(
                f"{files}: {len(images)} images and {len(labels)} labels in {prefix}-*, expected {expected}"
            )
        return images, labels

    return read


# ---------------------------------------------------------------- CIFAR-10

CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"  # the binary version: no pickles
CIFAR_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"  # as its authors' page says
CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR_PARTS = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
CIFAR_RECORD = 1 + 3 * 32 * 32  # bytes: a label, then three planes
CIFAR_RECORDS = 10_000  # a file


def cifar10(out: Path, source: Path | None = None) -> list[manifest.Manifest]:
    """Write CIFAR-10 as OUT/{train,test}/CLASS/NNNNN.png (32x32, RGB) with a manifest each.

    source: its authors' binary archive (cifar-10-binary.tar.gz), or a folder with the files in it; else it is
    downloaded, and its checksum is verified. A part whose manifest is there is left as it is.
    """

    def files(scratch: Path) -> Path:
        archive = source or download(CIFAR_URL, CIFAR_MD5, scratch)
        if archive.is_dir():
            return archive
        wanted = {name for names in CIFAR_PARTS.values() for name in names}
        try:
            with tarfile.open(archive) as tar:
                for member in tar:
                    if member.isreg() and Path(member.name).name in wanted:
                        with open(scratch / Path(member.name).name, "wb") as target:
                            shutil.copyfileobj(tar.extractfile(member), target)
        except (tarfile.TarError, OSError, EOFError, zlib.error) as problem:
            raise RequestError(f"--source {archive}: not CIFAR-10's binary archive ({problem})") from None
        return scratch

    return write_parts(out, list(CIFAR_CLASSES), {p: cifar_reader(names) for p, names in CIFAR_PARTS.items()}, files)


def cifar_reader(names: Sequence[str]) -> Reader:
    def read(files: Path) -> tuple[np.ndarray, np.ndarray]:
        parts = []
        for name in names:
            found = next(
                (path for path in (files / name, files / "cifar-10-batches-bin" / name) if path.exists()), None
            )
            if found is None:
                raise RequestError(f"--source {files}: no {name} in it (the binary version, cifar-10-binary.tar.gz)")
            rows = np.fromfile(found, np.uint8)
            if len(rows) != CIFAR_RECORDS * CIFAR_RECORD:
                raise RequestError(f"{found}: {len(rows)} bytes, expected {CIFAR_RECORDS * CIFAR_RECORD}")
            parts.append(rows.reshape(CIFAR_RECORDS, CIFAR_RECORD))
        rows = np.concatenate(parts)
        if rows[:, 0].max() >= len(CIFAR_CLASSES):
            raise RequestError(f"--source {files}: a label is {rows[:, 0].max()}: not CIFAR-10")
        return rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), rows[:, 0]

    return read


def download(url: str, md5: str, scratch: Path) -> Path:
    """A file, with a bar, its checksum verified."""
    target, digest = scratch / url.rsplit("/", 1)[1], hashlib.md5(usedforsecurity=False)
    try:
        with urllib.request.urlopen(url, timeout=60) as answer, open(target, "wb") as file:
            size = int(answer.headers.get("Content-Length") or 0) or None
            with progress.bar(total=size, desc=target.name, unit="B", unit_scale=True) as bar:
                while block := answer.read(2**20):
                    file.write(block)
                    digest.update(block)
                    bar.update(len(block))
    except OSError as problem:
        raise RunError(
            f"{url} cannot be had ({problem}). On a machine without network name the archive with --source"
        ) from None
    if digest.hexdigest() != md5:
        raise RunError(f"{url}: its MD5 is {digest.hexdigest()}, expected {md5}")
    return target


# ---------------------------------------------------------------- writing


def write_parts(
    out: Path, classes: Sequence[str], parts: Mapping[str, Reader], files: Callable[[Path], Path]
) -> list[manifest.Manifest]:
    """OUT/PART/CLASS/NNNNN.png of what each part's reader finds in a folder of files. Parts that are there are left."""
    done = [out / part / manifest.FILE_NAME for part in parts]
    if all(p.exists() for p in done):
        return [manifest.Manifest(p) for p in done]
    for path in done:
        if path.parent.exists() and not path.exists():
            raise RequestError(
                f"--out {out}: {path.parent} is there and has no {manifest.FILE_NAME}; "
                "choose another folder, or remove that one"
            )
    with tempfile.TemporaryDirectory(prefix="hpc-lbsgd-fetch-") as folder:
        found = files(Path(folder))
        return [
            manifest.Manifest(path) if path.exists() else write_part(path.parent, classes, *read(found))
            for path, read in zip(done, parts.values(), strict=True)
        ]


def write_part(target: Path, classes: Sequence[str], images: np.ndarray, labels: np.ndarray) -> manifest.Manifest:
    """images: uint8 (N, H, W) or (N, H, W, 3)."""
    from PIL import Image

    # Written beside its place and renamed: a part that is there is whole.
    building = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        for name in classes:
            (building / name).mkdir(parents=True)
        pairs = zip(images, progress.bar(labels, desc=f"writing {target}", unit="image"), strict=True)
        for i, (image, label) in enumerate(pairs):
            png = building / classes[label] / f"{i:05d}.png"
            Image.fromarray(np.ascontiguousarray(image)).save(png, compress_level=1)
        tree.index(building)
        os.replace(building, target)
    except OSError:
        if not (target / manifest.FILE_NAME).exists():  # else another process has fetched the same meanwhile
            raise
    finally:  # Ctrl-C, too, leaves nothing
        shutil.rmtree(building, ignore_errors=True)
    return manifest.Manifest(target / manifest.FILE_NAME)


SOURCES = {"fashion-mnist": fashion_mnist, "cifar10": cifar10}

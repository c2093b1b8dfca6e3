"""Data sets that can be had by name, written as real image files with a manifest."""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from hpc_lbsgd.data import manifest, tree
from hpc_lbsgd.errors import RequestError, RunError

DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("usr/share/datasets/fashion-mnist")
FASHION_CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot")
FASHION_PARTS = {"train": ("train", 60_000), "test": ("t10k", 10_000)}


def read_idx(path: Path) -> np.ndarray:
    """An array in the IDX format of MNIST's files (big-endian sizes, uint8 values), gzipped or not."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as f:
        data = f.read()
    dimensions = data[3]
    shape = np.frombuffer(data, ">u4", dimensions, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


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
    done = [out / part / manifest.FILE_NAME for part in FASHION_PARTS]
    if all(p.exists() for p in done):
        return [manifest.Manifest(p) for p in done]
    for path in done:
        if path.parent.exists() and not path.exists():
            raise RequestError(
                f"--out {out}: {path.parent} is there and has no {manifest.FILE_NAME}; "
                "choose another folder, or remove that one"
            )
    with tempfile.TemporaryDirectory(prefix="fashion-mnist-") as folder:
        scratch = Path(folder)
        installed = Path("/") / DEBIAN_FOLDER
        files = (
            source or (installed if installed.is_dir() else None) or from_debian(scratch) or from_torchvision(scratch)
        )
        return [
            manifest.Manifest(path)
            if path.exists()
            else _write_part(files, path.parent, *FASHION_PARTS[path.parent.name])
            for path in done
        ]


def _write_part(files: Path, target: Path, prefix: str, expected: int) -> manifest.Manifest:
    from PIL import Image

    arrays = []
    for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        found = [files / f"{prefix}-{kind}{end}" for end in ("", ".gz") if (files / f"{prefix}-{kind}{end}").exists()]
        if not found:
            raise RequestError(f"--source {files}: no {prefix}-{kind} or {prefix}-{kind}.gz in it")
        arrays.append(read_idx(found[0]))
    images, labels = arrays
    if len(images) != expected or len(labels) != expected:
        raise RequestError(f"{files}: {len(images)} images and {len(labels)} labels in {prefix}-*, expected {expected}")
    # Written beside its place and renamed: a part that is there is whole.
    building = target.with_name(f".{target.name}.{os.getpid()}")
    names = [f"{i}-{name}" for i, name in enumerate(FASHION_CLASSES)]
    for name in names:
        (building / name).mkdir(parents=True)
    for i, (image, label) in enumerate(
        zip(images, tqdm(labels, desc=f"writing {target}", unit="image", disable=None), strict=True)
    ):
        Image.fromarray(image).save(building / names[label] / f"{i:05d}.png", compress_level=1)
    tree.index(building)
    os.replace(building, target)
    return manifest.Manifest(target / manifest.FILE_NAME)


SOURCES = {"fashion-mnist": fashion_mnist}

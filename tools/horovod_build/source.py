"""Horovod's source distribution, and the edits that let it compile today."""

from __future__ import annotations

import os
import sys
import tarfile
from pathlib import Path

from horovod_build.processes import run

HOROVOD = "0.28.1"
PATCH_LEVEL = 1  # part of the cache key: raise it when the edits below change


def fetch_source(into: Path) -> Path:
    """Unpack the source distribution (HOROVOD_SDIST names a file for machines without a package index)."""
    sdist = os.environ.get("HOROVOD_SDIST")
    if not sdist:
        run(
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "--no-binary",
            ":all:",
            "--dest",
            into,
            f"horovod=={HOROVOD}",
            env={**os.environ, "HOROVOD_SKIP_COMPILE": "1"},
        )
        sdist = into / f"horovod-{HOROVOD}.tar.gz"
    with tarfile.open(sdist) as tar:
        if hasattr(tarfile, "data_filter"):
            tar.extractall(into, filter="data")
        else:
            tar.extractall(into)
    return into / f"horovod-{HOROVOD}"


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    if old not in text:
        raise RuntimeError(f"{path}: expected to find {old!r}; is this Horovod {HOROVOD}?")
    path.write_text(text.replace(old, new))


def patch_source(source: Path, cxx_standard: int) -> None:
    """What keeps 0.28.1 from compiling today. CMake strips -std= from CXXFLAGS, so files are edited."""
    for cmake in (source / "CMakeLists.txt", source / "horovod" / "torch" / "CMakeLists.txt"):
        edit(cmake, "set(CMAKE_CXX_STANDARD 14)", f"set(CMAKE_CXX_STANDARD {cxx_standard})")
    # nvcc 13 needs C++17 for its own headers.
    edit(
        source / "horovod/common/ops/cuda/CMakeLists.txt", "set(CMAKE_CUDA_STANDARD 11)", "set(CMAKE_CUDA_STANDARD 17)"
    )
    # A CUDA torch beside any CUDA folder would switch CUDA on; a CPU build must be able to say no.
    edit(
        source / "cmake/Modules/FindPytorch.cmake",
        "import torch; from torch.utils.cpp_extension import CUDA_HOME; print(True if (",
        "import os, torch; from torch.utils.cpp_extension import CUDA_HOME; "
        "print(True if (os.environ.get('HOROVOD_GPU_OPERATIONS') and ",
    )

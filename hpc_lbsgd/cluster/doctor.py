"""`doctor`: what this machine and environment can do, and the fix for what they cannot."""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

OK, WARN, FAIL = "ok", "warn", "fail"


class Finding(NamedTuple):
    level: str  # ok | warn | fail
    what: str
    found: str
    fix: str = ""


def output_of(*command: str, timeout_s: float = 20) -> str | None:
    """What a command prints; None where it is not there or fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def check_python() -> Iterator[Finding]:
    yield Finding(
        OK if sys.version_info >= (3, 10) else FAIL,
        "python",
        f"{platform.python_version()} in {sys.prefix}",
        "Python 3.10 or later is needed",
    )


def check_compiler() -> Iterator[Finding]:
    path = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    line = output_of(path, "--version") if path else None
    yield (
        Finding(OK, "c++ compiler", line.splitlines()[0])
        if line
        else Finding(
            WARN,
            "c++ compiler",
            "none",
            "needed to build Horovod, not to run it: install g++ or load your site's gcc module",
        )
    )


def check_mpi() -> Iterator[Finding]:
    from hpc_lbsgd.cluster.launchers import find_mpirun
    from hpc_lbsgd.errors import RequestError

    try:
        mpirun = find_mpirun()
        yield Finding(OK, "mpirun", f"{(output_of(mpirun, '--version') or '?').splitlines()[0]} ({mpirun})")
    except RequestError as problem:
        yield Finding(FAIL, "mpirun", "none", str(problem))
    # in a process of its own: loading MPI may abort, and must not start MPI here
    code = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.Get_library_version())"
    library = output_of(sys.executable, "-c", code)
    if library:
        yield Finding(OK, "mpi4py", f"{version('mpi4py')} on {library.splitlines()[0].split(',')[0].strip()}")
    else:
        yield Finding(
            FAIL,
            "mpi4py",
            f"{version('mpi4py') or 'not installed'}: does not load",
            "it finds no MPI library, or one of another kind: make setup MPI=wheel|system",
        )
    if os.geteuid() == 0 and not os.environ.get("OMPI_ALLOW_RUN_AS_ROOT"):
        yield Finding(
            WARN,
            "user",
            "root",
            "Open MPI refuses root: run as a user, or set OMPI_ALLOW_RUN_AS_ROOT=1 and "
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 (containers)",
        )


def check_torch() -> Iterator[Finding]:
    import torch

    yield Finding(OK, "torch", f"{torch.__version__}, torchvision {version('torchvision')}")
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        yield Finding(OK, "gpus", f"{len(names)}: {', '.join(sorted(set(names)))}; CUDA {torch.version.cuda}")
    elif shutil.which("nvidia-smi") and output_of("nvidia-smi", "-L"):
        yield Finding(
            FAIL,
            "gpus",
            f"nvidia-smi lists some, torch {torch.__version__} cannot use them",
            f"the driver is too old for CUDA {torch.version.cuda}, or torch is a CPU build",
        )
    else:
        yield Finding(WARN, "gpus", "none: ranks compute on CPUs", "fine for checks; training at scale wants GPUs")


def check_horovod() -> Iterator[Finding]:
    import torch

    code = (
        "import json, horovod.torch as h; print(json.dumps(dict(mpi=bool(h.mpi_built()), gloo=bool(h.gloo_built()), "
        "nccl=int(h.nccl_built()), cuda=bool(h.cuda_built()))))"
    )
    report = output_of(sys.executable, "-c", code, timeout_s=60)
    rebuild = "python tools/build_horovod.py (make setup)"
    if report is None:
        yield Finding(
            FAIL, "horovod", f"{version('horovod') or 'not installed'}: does not load", f"build it: {rebuild}"
        )
        return
    built = json.loads(report)
    parts = ", ".join(k for k in ("mpi", "gloo", "nccl") if built[k])
    info = Path(sysconfig.get_path("platlib")) / "horovod" / "hpc_lbsgd_build.json"
    made = json.loads(info.read_text()) if info.exists() else {}
    yield Finding(
        OK if built["mpi"] else FAIL,
        "horovod",
        f"{version('horovod')} with {parts}",
        f"it was built without MPI: {rebuild}",
    )
    if made and made["torch"].split()[0] != torch.__version__:
        yield Finding(
            FAIL,
            "horovod's torch",
            f"built for {made['torch'].split()[0]}, installed {torch.__version__}",
            f"rebuild: {rebuild}",
        )
    if torch.cuda.is_available() and not built["nccl"]:
        yield Finding(
            FAIL, "horovod's nccl", "none, and there are GPUs", f"load the CUDA toolkit (nvcc), then {rebuild}"
        )


def check_dali() -> Iterator[Finding]:
    try:
        import nvidia.dali

        yield Finding(OK, "dali", nvidia.dali.__version__)
    except ImportError as problem:
        yield Finding(
            WARN,
            "dali",
            f"does not load ({problem})",
            "pip install nvidia-dali-cuda130, or set data.loader=torchvision",
        )


def check_slurm() -> Iterator[Finding]:
    line = output_of("sinfo", "--version")
    yield (
        Finding(OK, "slurm", line)
        if line
        else Finding(WARN, "slurm", "none on PATH", "fine without a cluster: use `hpc-lbsgd launch`")
    )


def check_limits() -> Iterator[Finding]:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    yield Finding(OK if files >= 4096 else WARN, "open files", str(files), "ulimit -n 4096")
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    enough = locked == resource.RLIM_INFINITY or locked >= 2**30
    yield Finding(
        OK if enough else WARN,
        "locked memory",
        "unlimited" if locked == resource.RLIM_INFINITY else f"{locked / 2**20:.0f} MB",
        "InfiniBand wants more: ulimit -l unlimited (the site's limits.conf)",
    )
    shm = shutil.disk_usage("/dev/shm").free / 2**30 if os.path.isdir("/dev/shm") else 0
    yield Finding(
        OK if shm >= 1 else WARN,
        "/dev/shm",
        f"{shm:.1f} GB free",
        "MPI's shared memory wants 1 GB: mount it larger (containers: --shm-size)",
    )
    disk = shutil.disk_usage(".").free / 2**30
    yield Finding(OK if disk >= 5 else WARN, "disk here", f"{disk:.0f} GB free", "runs and checkpoints go to ./runs")


CHECKS: list[Callable[[], Iterator[Finding]]] = [
    check_python,
    check_compiler,
    check_mpi,
    check_torch,
    check_horovod,
    check_dali,
    check_slurm,
    check_limits,
]


def examine() -> list[Finding]:
    """Run every check; one that breaks is itself a finding."""
    findings = []
    for check in CHECKS:
        name = check.__name__.removeprefix("check_")
        try:
            findings += [f._replace(fix="") if f.level == OK else f for f in check()]
        except Exception as problem:  # a broken environment may raise anything; the others still count
            findings.append(Finding(FAIL, name, f"{type(problem).__name__}: {problem}", "make setup"))
    return findings


def show(findings: list[Finding]) -> str:
    lines = []
    for f in findings:
        lines.append(f"{f.level:4}  {f.what:16} {f.found}" + (f"\n      {'':16} -> {f.fix}" if f.fix else ""))
    return "\n".join(lines)

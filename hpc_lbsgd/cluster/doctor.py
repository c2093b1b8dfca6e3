"""`doctor`: what this machine and environment can do, and the fix for what they cannot."""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from hpc_lbsgd.cluster import gpu_checks, on_ranks
from hpc_lbsgd.cluster.finding import FAIL, OK, WARN, Finding, output_of, version
from hpc_lbsgd.parallel import gpus
from hpc_lbsgd.schedulers.known import SCHEDULERS


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


def without_horovod() -> str:
    """How bad it is that Horovod or MPI are missing: nothing is broken where Horovod was never asked for."""
    return FAIL if version("horovod") else WARN


def check_fixed_point() -> Iterator[Finding]:
    """What rounds the sums of `any-ranks` on CPUs."""
    import torch

    from hpc_lbsgd.parallel.fixed_point import made_for

    try:
        made_for(torch.device("cpu"))
    except Exception as problem:  # a compiler or a loader fails in any way
        yield Finding(
            WARN,
            "fixed point",
            f"torch's operations: {str(problem).strip() or type(problem).__name__}",
            "any-ranks has the same bits and takes longer on CPUs: install a C compiler, and the package again",
        )
    else:
        yield Finding(OK, "fixed point", "compiled for this CPU")


def check_engines() -> Iterator[Finding]:
    """What machine.engine may be here."""
    import torch.distributed as dist  # noqa: TID251  (what it was built with; nothing is started)

    built = [n for n, there in (("gloo", dist.is_gloo_available()), ("nccl", dist.is_nccl_available())) if there]
    others = f"torch and ddp ({', '.join(built)})"
    yield (
        Finding(OK, "engines", f"horovod, {others}")
        if version("horovod")
        else Finding(
            WARN,
            "engines",
            f"{others}; not horovod, the default",
            "set machine.engine = torch (make train ENGINE=torch), or install Horovod: make setup",
        )
    )


def check_mpi() -> Iterator[Finding]:
    from hpc_lbsgd.errors import RequestError
    from hpc_lbsgd.parallel.launchers import find_mpirun

    try:
        mpirun = find_mpirun()
        yield Finding(OK, "mpirun", f"{(output_of(mpirun, '--version') or '?').splitlines()[0]} ({mpirun})")
    except RequestError as problem:
        yield Finding(without_horovod(), "mpirun", "none", str(problem))
    # in a process of its own: loading MPI may abort, and must not start MPI here
    code = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.Get_library_version())"
    library = output_of(sys.executable, "-c", code)
    if library:
        seen = library.splitlines()[0].split(",")[0].strip()
        yield Finding(OK, "mpi4py", f"{version('mpi4py')} on {seen}")
        yield from check_mpi_is_one(seen)
    else:
        yield Finding(
            without_horovod(),
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


def check_mpi_is_one(library: str) -> Iterator[Finding]:
    """mpirun and the library that ranks load must be of one kind: else every rank believes to be alone."""
    from hpc_lbsgd.errors import RequestError
    from hpc_lbsgd.parallel.launchers import choose, find_mpirun

    try:
        word = choose(find_mpirun()).library
    except RequestError as problem:
        yield Finding(WARN, "mpi kind", str(problem), "launch with srun, or load another MPI module")
        return
    if word not in library:
        yield Finding(
            FAIL,
            "mpi kind",
            f"mpirun is {word}, ranks load {library}",
            "load the module of one MPI only, and rebuild: make setup MPI=system",
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
    elif problem := gpus.lost():
        found, _, fix = problem.partition(": ")
        yield Finding(FAIL, "gpus", found, fix)
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
        found = f"{version('horovod')}: does not load" if version("horovod") else "not installed"
        yield Finding(without_horovod(), "horovod", found, f"build it: {rebuild}")
        return
    built = json.loads(report)
    parts = ", ".join(k for k in ("mpi", "gloo", "nccl") if built[k])
    info = Path(sysconfig.get_path("platlib")) / "horovod" / "hpc_lbsgd_build.json"
    made = json.loads(info.read_text()) if info.exists() else {}
    yield Finding(
        OK if built["mpi"] else FAIL,
        "horovod",
        f"{version('horovod')} with {parts}{for_gpus(made) if built['nccl'] else ', for CPUs alone'}",
        f"it was built without MPI: {rebuild}",
    )
    if made and made["torch"].split()[0] != torch.__version__:
        yield Finding(
            FAIL,
            "horovod's torch",
            f"built for {made['torch'].split()[0]}, installed {torch.__version__}",
            f"rebuild: {rebuild}",
        )
    if torch.version.cuda and not built["nccl"]:
        gpus = torch.cuda.is_available()
        yield Finding(
            FAIL if gpus else WARN,
            "horovod's nccl",
            f"none, and {'there are GPUs' if gpus else f'torch is for GPUs (CUDA {torch.version.cuda})'}",
            "ranks on GPUs cannot sum with it: python tools/build_horovod.py --gpu nccl, or machine.engine = torch",
        )


def for_gpus(made: dict) -> str:
    """What a build with NCCL was made for, as far as it says so."""
    known = made and made.get("cuda")
    return f" {made['nccl']} (CUDA {made['cuda']}, sm_{made['cuda_archs'].replace(',', ', sm_')})" if known else ""


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


def check_scheduler() -> Iterator[Finding]:
    found = [s for s in SCHEDULERS.values() if shutil.which(s.version[0])]
    if not found:
        yield Finding(WARN, "scheduler", "none on PATH", "fine without a cluster: use `hpc-lbsgd launch`")
    for system in found:
        line = output_of(*system.version)
        fix = "its commands do not work here: load its module, or ask the cluster's support"
        yield Finding(OK if line else WARN, system.name, line or f"{' '.join(system.version)} fails", fix)
        if line and system.ping and output_of(*system.ping) is None:
            fix = f"ask the cluster's support; `{' '.join(system.ping)}` says more"
            yield Finding(FAIL, system.name, "does not answer", fix)
    if shutil.which("srun"):
        yield from check_srun()


def check_srun() -> Iterator[Finding]:
    try:
        listed = subprocess.run(["srun", "--mpi=list"], capture_output=True, text=True, timeout=20)
        plugins = sorted(set(re.findall(r"\b(pmix(?:_v\d)?|pmi2|cray_shasta)\b", listed.stdout + listed.stderr)))
    except (OSError, subprocess.SubprocessError):
        plugins = []
    yield Finding(
        OK if plugins else WARN,
        "srun --mpi",
        ", ".join(plugins) or "neither pmix nor pmi2",
        "srun cannot start MPI ranks: set launcher: mpirun in the site file",
    )


SHARED = {"lustre", "gpfs", "nfs", "nfs4", "beegfs", "ceph", "wekafs", "panfs", "fuse.glusterfs", "orangefs"}


def file_system(path: Path) -> str:
    """Type of the file system that holds `path`, from /proc/mounts."""
    best, kind = "", "unknown"
    for line in Path("/proc/mounts").read_text().splitlines():
        mount, found = line.split()[1:3]
        mount = mount.encode().decode("unicode_escape")
        if path.is_relative_to(mount) and len(mount) >= len(best):
            best, kind = mount, found
    return kind


def check_file_systems() -> Iterator[Finding]:
    """All nodes must see runs and data."""
    on_cluster = any(shutil.which(s.version[0]) for s in SCHEDULERS.values())
    for name in ("runs", "data"):
        path = Path(name).resolve()
        kind = file_system(path)
        shared = kind in SHARED
        yield Finding(
            OK if shared or not on_cluster else WARN,
            f"{name} on",
            f"{kind} ({path})",
            "not a file system that nodes usually share: work in a folder that all nodes see",
        )


def check_environment() -> Iterator[Finding]:
    """What every rank imports."""
    path = Path(sys.prefix).resolve()
    kind = file_system(path)
    yield Finding(
        WARN if kind in SHARED else OK,
        "environment on",
        f"{kind} ({path})",
        "many ranks are slow to import from there: make bundle, and name it in the site file (bundle, stage_dir)",
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
    gpu_checks.check_gpus,
    check_engines,
    check_fixed_point,
    check_horovod,
    check_dali,
    check_scheduler,
    check_file_systems,
    check_environment,
    check_limits,
]


def examine(
    mpi: bool = False, nodes: bool = False, hosts: str | None = None, read: Path | None = None
) -> list[Finding]:
    """Run every check; one that breaks is itself a finding. mpi: start real ranks too, two a node of `hosts`. nodes:
    compare these nodes, and what they read of `read`."""
    findings = []
    real = [partial(on_ranks.check_mpi, hosts)] if mpi else []
    real += [partial(on_ranks.check_nodes, hosts, read)] if nodes else []
    for check in [*CHECKS, *real]:
        name = getattr(check, "__name__", "real ranks").removeprefix("check_")
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

"""The CUDA compiler that fits torch: the site's, or from CUDA 13 on NVIDIA's wheels.

A Horovod built without one trains on CPUs alone, and the job that finds out has waited in the queue for it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from horovod_build.processes import run

# What nvcc compiles with. Those of CUDA 13 share one folder, nvidia/cu13, with the libraries that torch brings.
WHEELS = ("nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt", "nvidia-cuda-cccl")
FIRST_WITH_WHEELS = 13


def fitting(torch_cuda: str, fetch: bool) -> tuple[Path | None, str]:
    """CUDA's folder for a torch of CUDA `torch_cuda` ("13.0"); or None, and why with what to do. fetch: wheels may be
    installed."""
    major, others = int(torch_cuda.split(".")[0]), []
    for home in candidates(major):
        found = release(home / "bin" / "nvcc")
        if int(found.split(".")[0]) == major:
            return home, ""
        others.append(f"{home} has CUDA {found}")
    why = f"no nvcc of CUDA {major}, as torch has it" + (f" ({', '.join(others)})" if others else "")
    if major >= FIRST_WITH_WHEELS and fetch:
        try:
            return install(torch_cuda), ""
        except (subprocess.CalledProcessError, OSError) as problem:
            told = getattr(problem, "stderr", None) or str(problem)
            why += f", and its wheels could not be installed ({told.strip().splitlines()[-1][:200]})"
    elif major >= FIRST_WITH_WHEELS:
        why += ", whose wheels would be installed"
    return None, f"{why}: load your site's module (module load cuda/{torch_cuda}) or set CUDA_HOME"


def candidates(major: int) -> list[Path]:
    """Folders with an nvcc, in the order in which they are asked."""
    homes = [os.environ.get(name) for name in ("HOROVOD_CUDA_HOME", "CUDA_HOME")]
    found = [Path(home) / "bin" / "nvcc" for home in homes if home]
    found += [Path(path) for path in [shutil.which("nvcc")] if path]
    found.append(wheel_home(major) / "bin" / "nvcc")
    return list(dict.fromkeys(home_of(nvcc) for nvcc in found if os.access(nvcc, os.X_OK)))


def home_of(nvcc: Path) -> Path:
    """CUDA's real folder. nvcc may be a link or a wrapper script, so nvcc itself is asked."""
    dry = subprocess.run([nvcc, "-dryrun", "probe.cu"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", dry, re.M)
    return Path(top.group(1)).resolve() if top else nvcc.resolve().parent.parent


def release(nvcc: Path) -> str:
    """Its CUDA: 13.0."""
    return re.search(r"release ([\d.]+)", run(nvcc, "--version")).group(1)


def wheel_home(major: int) -> Path:
    return Path(sysconfig.get_path("platlib")) / "nvidia" / f"cu{major}"


def install(torch_cuda: str) -> Path:
    """NVIDIA's wheels of nvcc into this environment (60 MB), of torch's own CUDA."""
    print(f"Horovod: no nvcc of CUDA {torch_cuda} here, taking NVIDIA's wheels of it", file=sys.stderr)
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", *(f"{name}=={torch_cuda}.*" for name in WHEELS))
    home = wheel_home(int(torch_cuda.split(".")[0]))
    # CMake looks for lib64, and the linker for a name without a number
    for link, target in ((home / "lib64", "lib"), (home / "lib" / "libcudart.so", f"libcudart.so.{home.name[2:]}")):
        if not link.exists():
            link.symlink_to(target)
    return home

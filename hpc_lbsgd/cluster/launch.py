"""`launch`: compose the mpirun line of a training job, run it, and turn how it ended into an exit code."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from hpc_lbsgd import amend, progress
from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_REQUEST, EXIT_STOPPED, RequestError
from hpc_lbsgd.owner import HANDED_ON
from hpc_lbsgd.parallel.launchers import Launcher, Layout, check_hosts, exported, starter
from hpc_lbsgd.parallel.refusals import refusal, start
from hpc_lbsgd.records import RunFolder
from hpc_lbsgd.runs import as_word, choose_run, name_of, own_run
from hpc_lbsgd.signals import ASKED, ENDING, say, undisturbed

POLL_S = 0.5
END_GRACE_S = 30.0  # for a launcher to notice that its ranks have ended


def launch(layout: Layout, job, dry_run: bool, flavour: str | None = None) -> int:
    """Start `train`, `preflight` or `audit` on all ranks and wait for its end. job: its parsed arguments; of those that
    leave no run folder also its `words`."""
    if layout.hosts:
        check_hosts(layout.hosts, layout.ranks)
    if layout.hostfile and not Path(layout.hostfile).is_file():
        raise RequestError(f"--hostfile {layout.hostfile}: no such file")
    recipe = recipes.read(job.recipe, job.settings)  # refuses a wrong recipe here, before any rank starts
    launcher, path = starter(flavour, needs_mpi=recipe.machine.engine == "horovod")
    program = [sys.executable, "-m", "hpc_lbsgd.cli"]
    if job.command != "train":
        line = [*launcher.line(path, layout, exported(layout)), *program, *job.words]
        if dry_run:
            print(shlex.join(line))
            return EXIT_DONE
        progress.running(line)
        process, said = start(launcher, line)
        try:
            code = process.wait()
        finally:
            text = said()
        refuse(text, layout, flavour)
        return code if code in (EXIT_DONE, EXIT_REQUEST) else EXIT_FAILED
    amend.of_request(job.amend, job.resume)
    folder = choose_run(name_of(job.recipe), job.run, job.resume)
    program += [job.command, job.recipe]
    for setting in job.settings:
        program += ["--set", setting]
    program += ["--json"] if job.json else []
    program += ["--run", as_word(folder.path)]
    for change in job.amend:
        program += ["--amend", change]
    program += [job.resume] if job.resume else []
    if dry_run:
        print(shlex.join([*launcher.line(path, layout, exported(layout)), *program]))
        return EXIT_DONE
    asked = Asked(folder)
    folder, held = own_run(folder.path.name, str(folder.path), job.resume)
    try:
        os.environ[HANDED_ON] = held.lease.owner
        line = [*launcher.line(path, layout, exported(layout)), *program]
        return run(launcher, layout, line, folder, asked, flavour)
    finally:
        held.release()


def refuse(said: str, layout: Layout, flavour: str | None) -> None:
    """Raises RequestError where the launcher said why it could start nothing."""
    problem = refusal(said, layout, flavour)
    if problem:
        raise RequestError(problem)


class Asked:
    """What a person, a batch script or a closed terminal asked of this job: to stop safely, and then to end at once.

    The ranks are asked by the run's stop file: every MPI understands it, and it finds them in their start-up, where a
    signal would end them.
    """

    def __init__(self, folder: RunFolder):
        self.folder, self.stop, self.end, self.now = folder, False, False, False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame) -> None:
        first, self.stop = not self.stop, True  # before it is said: who reads it may be quick
        if first:
            say(ASKED)
        elif number in (signal.SIGINT, signal.SIGTERM):
            second, self.end = not self.end, True
            if second and self.folder.is_saving():
                say(ENDING)
            else:
                self.now = True

    @property
    def over(self) -> bool:
        """The ranks are to be ended; a checkpoint that is being written is not lost to it."""
        return self.end and (self.now or not self.folder.is_saving())

    def pass_on(self) -> None:
        """Again and again: a run that starts forgets what an earlier one was asked."""
        if self.stop:
            with contextlib.suppress(OSError):
                self.folder.stop_file.touch()


def wait(process: subprocess.Popen, folder: RunFolder, before: dict | None, asked: Asked) -> int:
    """The launcher's exit code. Rank 0 writes the run's status at its very end: a launcher that is still there long
    after that has missed the end of its ranks (Open MPI 5 at times: openpmix/prrte#1839), and is ended.

    before: the status that an earlier start left.
    """
    since = status = None
    while not asked.over and (since is None or time.monotonic() - since < END_GRACE_S):
        try:
            return process.wait(timeout=POLL_S)
        except subprocess.TimeoutExpired:
            status = folder.status()
        ended = status and status != before
        since = (since or time.monotonic()) if ended else None
        if not ended:
            asked.pass_on()
    process.terminate()
    try:
        process.wait(timeout=END_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return EXIT_FAILED if asked.end or status["status"] == "failed" else EXIT_DONE


def run(
    launcher: Launcher, layout: Layout, line: list[str], folder: RunFolder, asked: Asked, flavour: str | None = None
) -> int:
    """Run a job to its end. Ctrl-C asks it to stop at a safe point; a second one ends it. Raises RequestError where
    the launcher could start nothing."""
    progress.running(line)
    before, starts = folder.status(), folder.starts()
    with undisturbed():  # until it has a session of its own: Ctrl-C would reach mpirun too, and end the ranks
        process, said = start(launcher, line, start_new_session=True)
    code = wait(process, folder, before, asked)
    text = said()
    folder.stop_file.unlink(missing_ok=True)
    if code and not asked.end:
        refuse(text, layout, flavour)
    if asked.end:
        folder.abandon()  # it had not begun, perhaps
        if folder.exists():
            folder.claim_failure(error="ended by a second Ctrl-C or SIGTERM")
            say(f"ended at once; continue with --resume --run {shlex.quote(str(folder.path))}")
        else:
            say("ended at once, before the first step")
        return EXIT_INTERRUPTED
    status = folder.status()
    if code in (0, EXIT_STOPPED) and status and status["status"] == "stopped":  # a rank alone says it itself
        return EXIT_STOPPED
    if code == 0:
        return EXIT_DONE
    if status and status != before and status["status"] == "failed":
        print(
            f"hpc-lbsgd: failed first: rank {status.get('rank')} on {status.get('host')}: {status.get('error')}",
            file=sys.stderr,
        )
    elif folder.exists() and (code != EXIT_REQUEST or folder.starts() != starts):  # ranks may end with any code
        crashed = code not in (1, 126, 127)  # those: a rank said why, or nothing could be started
        folder.claim_failure(crashed=crashed, error=f"mpirun ended with {code}: a rank was killed or crashed")
        print(
            f"hpc-lbsgd: mpirun ended with {code}: a rank was killed or crashed; continue with --resume "
            f"--run {shlex.quote(str(folder.path))}",
            file=sys.stderr,
        )
        return EXIT_FAILED
    return code if code == EXIT_REQUEST else EXIT_FAILED

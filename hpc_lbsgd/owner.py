"""Taking a run folder, by operations that are atomic on NFS and Lustre too: hard link and rename, never a lock.

RUN/owner.json         the lease; its time of change is when it was renewed
RUN/.owner-TOKEN       who follows the lease with this token: can be made once, so that of many who find an owner
                       dead one follows it. It then replaces owner.json. The owner is the last of the line
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from hpc_lbsgd.errors import EXIT_DONE, EXIT_REQUEST, EXIT_STOPPED, RequestError
from hpc_lbsgd.lease import RENEW_S, Ask, Facts, Lease, Process, Verdict, judge
from hpc_lbsgd.records import RunFolder, appear, now, sync_folder
from hpc_lbsgd.schedulers import known
from hpc_lbsgd.schedulers.scheduler import HIDDEN, OVER

FILE_NAME = "owner.json"
HANDED_ON = "HPC_LBSGD_OWNER"  # to what the owner starts; this prefix is handed to ranks on other hosts as well
TRIES = 20


# ---------------------------------------------------------------- this process and others


def space() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def started(pid: int) -> int | None:
    """When a process of this host began, in ticks since boot; None: it is gone, or dead and not yet buried. Raises
    PermissionError where it is there and cannot be looked at, as another user's where /proc hides those (hidepid)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        raise PermissionError(f"process {pid}") from None
    return None if fields[0] in "ZX" else int(fields[19])


def this_process() -> Process:
    return Process(socket.gethostname(), space(), os.getpid(), started(os.getpid()))


def alive(process: Process) -> bool | None:
    """None: it is where we cannot look."""
    with contextlib.suppress(PermissionError):
        return started(process.pid) == process.started if process.space == space() else None
    return None


def ask_from(env: Mapping[str, str], for_job: bool = False) -> Ask:
    system = known.of(env)
    if system is None:
        return Ask(env.get(HANDED_ON) or None, for_job=for_job)
    job, cluster = system.job_of(env), system.cluster_of(env)
    return Ask(env.get(HANDED_ON) or None, job, cluster, system.restart_of(env), for_job, system.name)


def job_there(lease: Lease) -> bool | None:
    """Whether the batch system has an owner's job, running or waiting; None where it does not answer or tell, or is
    another cluster's."""
    system = known.scheduler(lease.scheduler)
    if lease.cluster and lease.cluster != (system.cluster_of(os.environ) or system.cluster_here()):
        return None
    found = system.look(lease.job)
    if found is None or any(seen.state == HIDDEN for seen in found):
        return None
    return any(seen.state not in OVER for seen in found)


def facts_of(lease: Lease, ask: Ask, renewed: float, clock: Callable[[], float]) -> Facts:
    """clock: the file system's; it writes, and is asked where nothing else decides."""
    there = job_there(lease) if lease.job and lease.job != ask.job else None
    processes = tuple(alive(p) for p in lease.processes)
    idle_s = clock() - renewed if None in processes and True not in processes else 0.0
    return Facts(processes, there, idle_s)


# ---------------------------------------------------------------- the file


class OwnerFile:
    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.path = self.folder / FILE_NAME

    def _heir(self, token: str) -> Path:
        return self.folder / f".owner-{token}"

    def read(self) -> tuple[Lease, float] | None:
        """(the owner, when it was renewed by the file system's clock); None: there is none."""
        found = heir = self._read(self.path)
        while heir:
            found = heir
            heir = self._read(self._heir(found[0].token))
        return found

    def _read(self, path: Path) -> tuple[Lease, float] | None:
        """Waits a moment for a file that is being written, where files cannot appear whole."""
        for _ in range(TRIES):
            try:
                with open(path) as f:
                    return Lease.from_json(json.load(f)), os.fstat(f.fileno()).st_mtime
            except FileNotFoundError:
                return None
            except (ValueError, TypeError, KeyError, RecursionError):
                time.sleep(0.1)
            except OSError as problem:
                raise RequestError(f"{path}: {problem.strerror}") from None
        raise RequestError(f"{path} cannot be read: if nothing is at work in this run folder, remove that file")

    def clock(self) -> float:
        """Now, as the file system says it: its times are compared with one another, never with this host's."""
        probe = self.folder / f".owner-{secrets.token_hex(8)}.clock"
        probe.touch()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink()

    def follow(self, before: Lease | None, lease: Lease) -> bool:
        """Make `lease` the owner after `before`. False: somebody else was faster."""
        target = self._heir(before.token) if before else self.path
        whole = self.folder / f".owner-{lease.token}.new"
        try:
            with open(whole, "x") as f:
                f.write(json.dumps(lease.as_json(), indent=1) + "\n")
                f.flush()
                os.fsync(f.fileno())
            with contextlib.suppress(FileExistsError):
                appear(whole, target)
            found = self.read()  # an answer that was lost on its way says that the link is there already
            if found is None or found[0].token != lease.token:
                found = self._read(target)
                if found and found[0].token == lease.token:  # behind an owner that was followed meanwhile
                    target.unlink(missing_ok=True)
                return False
            if before:
                os.replace(whole, self.path)
                target.unlink(missing_ok=True)
            sync_folder(self.folder)
            return True
        finally:
            whole.unlink(missing_ok=True)


# ---------------------------------------------------------------- taking it


class Held:
    """A run folder that is ours. Renewed by a thread, until `release`."""

    def __init__(self, file: OwnerFile, lease: Lease, ask: Ask, on_lost: Callable[[str], None] | None = None):
        self.file, self.lease, self._shared = file, lease, ask.owner == lease.owner
        self._end = threading.Event()
        self._on_lost = on_lost
        self.above: list[Path] = []  # folders that were made for it
        if not lease.held_by_job:
            threading.Thread(target=self._renew, name="owner", daemon=True).start()

    def _renew(self) -> None:
        while not self._end.wait(RENEW_S):
            with contextlib.suppress(OSError, RequestError):  # the next time, perhaps
                found = self.file.read()
                if found and found[0].owner != self.lease.owner:
                    if self._on_lost:
                        self._on_lost(f"{self.file.folder} was taken over by {found[0]}: this start ends here")
                    return
                os.utime(self.file.path)

    def release(self) -> None:
        """Where another shares the run, and may be at work, it is left to that one."""
        self._end.set()
        others = [p for p in self.lease.processes if p != this_process()]
        if self._shared and (self.lease.held_by_job or any(alive(p) is not False for p in others)):
            return
        release(self.file, lambda lease: lease.owner == self.lease.owner)
        for folder in self.above:
            with contextlib.suppress(OSError):  # not empty: something came of it
                folder.rmdir()


def release(file: OwnerFile, ours: Callable[[Lease], bool]) -> None:
    with contextlib.suppress(OSError, RequestError):
        found = file.read()
        if found and ours(found[0]):
            file.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty, mostly
            file.folder.rmdir()


def take(
    folder: str | os.PathLike,
    for_job: bool = False,
    on_lost: Callable[[str], None] | None = None,
    name: str | None = None,
) -> Held:
    """Make this process (for_job: this batch job) the owner of a folder, before anything in it is read or written.
    name: of the folder in messages (default: --run FOLDER).

    Raises RequestError, and changes nothing, where another may be at work in it.
    """
    file, ask = OwnerFile(folder), ask_from(os.environ, for_job)
    lease = Lease(
        owner=secrets.token_hex(8),
        token=secrets.token_hex(8),
        since=now(),
        host=socket.gethostname(),
        processes=() if for_job else (this_process(),),
        job=ask.job,
        cluster=ask.cluster,
        restart=ask.restart,
        scheduler=ask.scheduler,
    )
    name = name or f"--run {folder}"
    with contextlib.suppress(OSError):  # what is wrong with the name is said below
        if stat.S_ISREG(file.folder.stat().st_mode):  # asked at once: the folder may come and go meanwhile
            raise RequestError(f"{name}: is a file, not a run folder")
    if file.folder.is_symlink() and not file.folder.exists():
        raise RequestError(f"{name}: is a link to what is not there")
    above = [parent for parent in file.folder.absolute().parents if not parent.exists()]
    for _ in range(TRIES):
        try:
            file.folder.mkdir(parents=True, exist_ok=True)
            held, verdict = look(file, ask)
            if verdict is Verdict.REFUSE:
                raise refusal(name, file, held)
            mine = lease
            if verdict is Verdict.SHARE:
                if held.held_by_job and not for_job:
                    return Held(file, held, ask)
                mine = replace(lease, owner=held.owner, processes=(*held.processes, *lease.processes))
            if file.follow(held, mine):
                owner = Held(file, mine, ask, on_lost)
                owner.above = above
                return owner
        except (FileNotFoundError, FileExistsError):  # meanwhile an owner gave it up, and removed the empty folder
            continue
        except OSError as problem:
            raise RequestError(f"{name}: cannot be written: {problem.strerror or problem}") from None
    raise RequestError(f"{name}: too many starts at the same time; start again")


def look(file: OwnerFile, ask: Ask) -> tuple[Lease | None, Verdict]:
    """(who has the folder, what that means for who asks)"""
    found = file.read()
    if not found:
        return None, Verdict.TAKE
    lease, renewed = found
    facts = facts_of(lease, ask, renewed, file.clock) if ask.owner != lease.owner else Facts()
    return lease, judge(lease, ask, facts)


def check(folder: str | os.PathLike) -> None:
    """Raises RequestError where another start may be at work in a run folder; takes nothing."""
    file = OwnerFile(folder)
    held, verdict = look(file, ask_from(os.environ))
    if verdict is Verdict.REFUSE:
        raise refusal(f"--run {folder}", file, held)


def at_work(folder: str | os.PathLike) -> bool:
    """Whether somebody may be at work in a run folder: it has an owner, who is not provably over. Changes nothing, so
    that an owner on another host is not judged by its age."""
    file = OwnerFile(folder)
    try:
        found = file.read()
    except RequestError:
        return True
    if not found:
        return False
    lease, renewed = found
    return judge(lease, Ask(), facts_of(lease, Ask(), renewed, lambda: renewed)) is not Verdict.FOLLOW


def refusal(name: str, file: OwnerFile, held: Lease) -> RequestError:
    return RequestError(
        f"{name}: in use by {held}. Wait for its end or stop it; if you know that it is over, remove {file.path}"
    )


def own(folder: str | os.PathLike, ended_with: int | None = None, successor: str | None = None) -> None:
    """For a batch script: take a run folder for its job, and print what ranks must find in HPC_LBSGD_OWNER. Or give it
    up, at the job's end with this exit code: a failure that no rank lived to tell is on record then. Or pass it to
    another job, which goes on with the run."""
    job = ask_from(os.environ).job
    if not job:
        raise RequestError("own: not in a batch job; `train` and `launch` take a run folder by themselves")
    if successor is not None:
        file = OwnerFile(folder)
        found = file.read()
        if not found or not (found[0].job == job and found[0].held_by_job):
            raise RequestError(f"own: {folder} is not this job's to pass on")
        file.follow(found[0], replace(found[0], token=secrets.token_hex(8), job=successor, since=now(), restart=0))
        return
    if ended_with is not None:
        run = RunFolder(folder)
        if ended_with not in (EXIT_DONE, EXIT_REQUEST, EXIT_STOPPED) and run.exists():
            run.claim_failure(error=f"the job ended with {ended_with}: a rank was killed or ended without a word")
        release(OwnerFile(folder), lambda lease: lease.job == job and lease.held_by_job)
        return
    print(take(folder, for_job=True).lease.owner, file=sys.stdout, flush=True)

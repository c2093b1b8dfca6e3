"""A bundle on this node's disk: unpacked once, kept for the next job, and believed only if nothing in it has changed.

STAGE_DIR/<user number>-bundle-<16 digits of its checksum>/    the user's alone
    env/           the environment; appears when it is whole
    staged.json    what it was then, file by file
    lock           held meanwhile: two jobs on a node unpack once; its time is that of the last job

Unpacking one removes those that no job has asked for within a day and no process runs from.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from hpc_lbsgd.cluster.bundle import BEFORE_SUM, BLOCK, Bundle, digest, files_below, read
from hpc_lbsgd.errors import RequestError, RunError
from hpc_lbsgd.private import check_room, identity, make_private, refuse_exchangeable
from hpc_lbsgd.recipe import STAGE_DIR, expanded
from hpc_lbsgd.records import write_atomically
from hpc_lbsgd.schedulers import known

KEPT_S = 86400.0
KEY = "stage_dir"


def here(path: Path) -> tuple[str, str, Path]:
    """(this node, as its batch system calls it; "unpacked" or "there"; the environment's Python), by what the job's
    script says in the environment."""
    host = known.host() or socket.gethostname()
    if STAGE_DIR not in os.environ:
        raise RequestError(f"{STAGE_DIR} is not set: say in the site file where nodes have a disk of their own: {KEY}")
    try:
        python, fresh = unbundle(path, expanded(os.environ[STAGE_DIR], STAGE_DIR))
    except RunError as problem:
        raise RunError(f"{host}: {problem}") from None
    return host, "unpacked" if fresh else "there", python


def unbundle(path: Path, stage_dir: str) -> tuple[Path, bool]:
    """(the environment's Python on this node, whether it was unpacked now). One process a node calls it.

    Raises RequestError where there is no bundle; RunError where it is damaged, this node lacks the Python that it
    links to, or its disk is full: nothing half unpacked stays.
    """
    what = read(path)
    if not os.access(what.base, os.X_OK):
        raise RunError(f"{path} needs Python {what.python} at {what.base}, which this node lacks")
    target = Path(os.path.abspath(stage_dir)) / f"{os.geteuid()}-bundle-{what.checksum[:16]}"
    environment = target / "env"
    try:
        make_private(target, KEY)
        refuse_exchangeable(target, KEY)
        with open(target / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            os.utime(lock.fileno())
            fresh = not is_whole(target)
            if fresh:
                remove_unused(target)
                unpack(path, what, target)
    except (OSError, RunError) as problem:
        if os.path.exists(path) and read(path) != what:
            return unbundle(path, stage_dir)  # it was packed anew meanwhile
        if isinstance(problem, RunError):
            raise
        raise RunError(f"{KEY}: cannot write {target}: {problem.strerror or problem}") from None
    python = environment / "bin" / "python"
    check_python(python, what)
    return python, fresh


def is_whole(target: Path) -> bool:
    """Whether all is as it was unpacked: what tidies old files away takes some of them, too."""
    try:
        return json.loads((target / "staged.json").read_text())["files"] == listing(target / "env")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def listing(root: Path) -> str:
    """A digest of what files and links there are, and of their identities; without those that Python adds. The same
    by whatever path this folder is reached."""
    found = digest()
    for name, path in sorted(files_below(root)):
        if "__pycache__" not in path.parts:
            found.update(os.fsencode(name) + repr(identity(path)).encode())
    return found.hexdigest()


def unpack(path: Path, what: Bundle, target: Path) -> None:
    half, environment = target / ".unpacking", target / "env"
    shutil.rmtree(half, ignore_errors=True)
    if not is_running(target):
        shutil.rmtree(environment, ignore_errors=True)
    check_room(target, what.bytes, KEY)
    half.mkdir()
    try:
        content, said = extract(path, half)
        if content != what.content:
            raise RunError(
                f"{path}: not the bytes that were packed (checksum {content}, packed {what.content}); copy it again, "
                "or pack it again: make bundle"
            )
        if said:
            raise RunError(f"{KEY}: cannot unpack to {target}: {said}")
        subprocess.run(["sync", "-f", half], capture_output=True)  # not after a power cut a file without its bytes
        settle(half, environment)
    finally:
        shutil.rmtree(half, ignore_errors=True)
    write_atomically(target / "staged.json", json.dumps({"files": listing(environment), "bundle": str(path)}))


def settle(half: Path, environment: Path) -> None:
    """Let what was unpacked appear. What another job's processes run from is mended file by file: they import from it
    to their end."""
    if not environment.exists():
        os.rename(half, environment)
        return
    for name, path in files_below(half):
        there = environment / name
        there.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, there)


def extract(path: Path, folder: Path) -> tuple[str, str]:
    """(checksum of what was read, what tar says if it fails). tar writes while this process reads and sums."""
    found = digest()
    line = ["tar", "--extract", "--file=-", "--no-same-owner", "--warning=no-timestamp", f"--directory={folder}"]
    with open(path, "rb") as file, tempfile.TemporaryFile() as said:
        tar = subprocess.Popen(line, stdin=subprocess.PIPE, stderr=said)
        skip, listens = BEFORE_SUM, True
        while block := file.read(BLOCK):
            found.update(block[skip:])
            skip = 0
            with contextlib.suppress(BrokenPipeError):
                if listens:
                    listens = False
                    tar.stdin.write(block)
                    listens = True
        with contextlib.suppress(BrokenPipeError):
            tar.stdin.close()
        failed = tar.wait()
        said.seek(0)
        lines = said.read().decode(errors="replace").strip().splitlines()
    return found.hexdigest(), (lines[0] if lines else f"tar ended with {failed}") if failed else ""


def remove_unused(keep: Path) -> None:
    for other in keep.parent.glob(f"{os.geteuid()}-bundle-*"):
        with contextlib.suppress(OSError):
            unused = time.time() - (other / "lock").stat().st_mtime > KEPT_S
            if other != keep and unused and other.lstat().st_uid == os.geteuid() and not is_running(other):
                shutil.rmtree(other)


def is_running(folder: Path) -> bool:
    """Whether a process of this user was started from there."""
    start = os.fsencode(f"{folder}/")
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if process.read_bytes().startswith(start):
                return True
    return False


def check_python(python: Path, what: Bundle) -> None:
    """It starts here, and finds itself in its folder."""
    code = "import platform, sys; print(platform.python_version(), sys.prefix)"
    try:
        found = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, timeout=300)
    except (OSError, subprocess.TimeoutExpired) as problem:
        raise RunError(f"{python} does not start: {problem}") from None
    wanted = f"{what.python} {python.parents[1]}"
    if found.stdout.strip() != wanted:
        said = found.stdout.strip() or (found.stderr.strip().splitlines() or ["nothing"])[-1]
        raise RunError(f"{python} is not the Python {what.python} that was packed; {what.base} is another: {said}")

"""Folders on a node's disk that are the user's alone, and how what lies there is known again."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from pathlib import Path

from hpc_lbsgd.errors import RunError


def make_private(target: Path, key: str) -> None:
    """A folder that nobody else can write to; refuses one that another user put there under its name.

    key: of the recipe or site that names the place, for messages.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        target.mkdir(mode=0o700)
    there = target.lstat()
    if not stat.S_ISDIR(there.st_mode) or there.st_uid != os.geteuid():
        raise RunError(
            f"{key}: {target} is not a folder of yours (owner: user {there.st_uid}): what is in it cannot be trusted. "
            f"Have it removed, or name another {key}"
        )
    target.chmod(0o700)


def refuse_exchangeable(target: Path, key: str) -> None:
    """Refuses a folder in whose place everybody could put another one at any time: for what is executed from there."""
    for above in Path(os.path.realpath(target)).parents:
        mode = above.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise RunError(
                f"{key}: everybody can rename what lies in {above} (mode {stat.S_IMODE(mode):o}, without the sticky "
                f"bit), and put a program of theirs there: name another {key}, or have the bit set (chmod +t)"
            )


def check_room(target: Path, needed: int, key: str) -> None:
    """Refuses what the disk has no room for. needed: bytes."""
    free = shutil.disk_usage(target).free
    if needed > free:
        raise RunError(f"{key}: {target} has {free / 1e9:.1f} GB free, and {needed / 1e9:.1f} GB are to be copied")


def identity(path: str | os.PathLike) -> list[int]:
    """Another one after any change of the file: no user can set the time of a change back."""
    there = os.lstat(path)
    return [there.st_ino, there.st_size, there.st_mtime_ns, there.st_ctime_ns]

"""A small checkpoint, and a disk whose every call can be made to fail: for tests, and for rows of the fault matrix."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hpc_lbsgd import records
from hpc_lbsgd.records import RunFolder
from hpc_lbsgd.train import checkpoint
from hpc_lbsgd.train.writer import Writer

CALLS = ("fsync", "replace", "rename", "link", "symlink", "unlink", "remove", "mkdir", "rmdir", "truncate")
KINDS = {"first": "first save of a run", "next": "one is there", "prune": "older ones go", "torn": "on a torn one",
         "two": "two saves when a run stops"}  # fmt: skip
LAST = {"first": 1, "next": 2, "prune": 3, "torn": 2, "two": 3}  # the last step that is saved
HINTS = {errno.ENOSPC: "make room", errno.EIO: "file system works again", errno.EROFS: "make the folder writable"}


class Calls:
    """Numbers, from 1, the calls that change the disk; `act(name)` is called before, or in the middle of, the one for
    which `hit(number)` holds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, hit: Callable[[int], bool], act: Callable[[str], None]):
        self.hit, self.act, self.names = hit, act, []
        for name in CALLS:
            monkeypatch.setattr(os, name, self._wrapped(name, getattr(os, name)))
        for module in (checkpoint, records):
            monkeypatch.setattr(module, "open", self._open, raising=False)

    def count(self, name: str) -> None:
        self.names.append(name)
        if self.hit(len(self.names)):
            self.act(name)

    def _wrapped(self, name, function):
        def call(*args, **kwargs):
            self.count(name)
            return function(*args, **kwargs)

        return call

    def _open(self, path, mode="r", **kwargs):
        if mode[0] == "r":
            return open(path, mode, **kwargs)
        self.count("open")
        return Written(open(path, mode, buffering=0, **kwargs), self)


class Written:
    """A file; half of what the marked write was given reaches it."""

    def __init__(self, file, calls):
        self.file, self.calls = file, calls

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, content):
        self.calls.names.append("write")
        there = 0
        if self.calls.hit(len(self.calls.names)):
            there = self.file.write(bytes(content)[: len(content) // 2])
            self.file.flush()
            self.calls.act("write")
        return there + self.file.write(bytes(content)[there:])


def replica(step: int) -> SimpleNamespace:
    weights = {"w": torch.full((5,), float(step)), "running": torch.full((3,), float(step))}
    return SimpleNamespace(
        device=torch.device("cpu"), average=None, model=SimpleNamespace(state_dict=lambda: weights),
        optimizer=SimpleNamespace(state=lambda: {"momentum": {"w": weights["w"] + 0.5}}),
    )  # fmt: skip


def save(folder: RunFolder, step: int, keep: int = 2) -> None:
    checkpoint.save(folder, replica(step), checkpoint.State(step, "recipe", "data"), keep)


def prepared(folder: RunFolder, kind: str) -> int:
    """What is there before; returns the step of the newest good one."""
    before = {"first": [], "next": [1], "prune": [1, 2], "torn": [1, 2], "two": [1]}[kind]
    for step in before:
        save(folder, step)
    if kind == "torn":
        os.truncate(folder.checkpoints / "step-00000002" / "weights.pt", 40)
        return 1
    return max(before, default=0)


def act(folder: RunFolder, kind: str) -> None:
    """The saves that are disturbed."""
    if kind == "two":
        writer = Writer(folder, 1, 60.0, print)
        for step in (2, LAST[kind]):
            writer.save(replica(step), checkpoint.State(step, "recipe", "data"))
        writer.wait()
    else:
        save(folder, LAST[kind], keep=1 if kind == "prune" else 2)


def check(folder: RunFolder, good: int, last: int) -> int:
    """The newest whole one is `good` or newer, has its own weights, and the next start uses the folder.
    Returns its step."""
    found = checkpoint.find_newest(folder)
    step = found[1].step if found else 0
    assert good <= step <= last
    if found:
        weights, moments = (checkpoint.read(found[0] / n) for n in (checkpoint.WEIGHTS, checkpoint.OPTIMIZER))
        assert weights["w"].tolist() == [step] * 5 and moments["momentum"]["w"].tolist() == [step + 0.5] * 5
    if folder.newest_step() > good + 1 or (folder.newest_step() and good):
        named = folder.checkpoints / checkpoint.name_of(folder.newest_step())
        assert folder.newest_step() <= step or not checkpoint.is_whole(named)
    checkpoint.sweep(folder)
    save(folder, step + 1)
    assert checkpoint.find_newest(folder)[1].step == step + 1 == folder.newest_step()
    assert not [p for p in folder.checkpoints.iterdir() if ".step-" in p.name or p.name.startswith(".old")]
    return step


def copies(tmp_path: Path, kind: str) -> Iterator[tuple[int, RunFolder, int]]:
    """(number from 1, the folder before, the step of its newest good one), as often as it is wanted."""
    good = prepared(RunFolder(tmp_path / "before"), kind)
    (tmp_path / "before").mkdir(parents=True, exist_ok=True)
    number = 0
    while True:
        number += 1
        path = tmp_path / str(number)
        shutil.copytree(tmp_path / "before", path)
        yield number, RunFolder(path), good
        shutil.rmtree(path)


class Killed(BaseException):
    """From one call on nothing reaches the disk any more, what would tidy up neither: all that a kill leaves behind."""


def die(_):
    raise Killed

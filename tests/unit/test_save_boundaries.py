"""A save that is killed, or fails, at each call that writes, syncs, renames, links or removes: the last good checkpoint
loads, and the folder goes on being used. Every call, not a sample of them."""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from hpc_lbsgd import records
from hpc_lbsgd.errors import RunError
from hpc_lbsgd.records import RunFolder
from hpc_lbsgd.train import checkpoint
from hpc_lbsgd.train.writer import Writer

CALLS = ("fsync", "replace", "rename", "link", "symlink", "unlink", "remove", "mkdir", "rmdir", "truncate")
KINDS = {"first": "first save of a run", "next": "one is there", "prune": "older ones go", "torn": "on a torn one",
         "two": "two saves when a run stops"}  # fmt: skip


@pytest.fixture
def no_syncs(monkeypatch):
    """A killed process loses nothing that it wrote: syncs are counted, and cost nothing."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


class Calls:
    """Numbers, from 1, the calls that change the disk; `act(name)` is called before, or in the middle of, the one for
    which `hit(number)` holds."""

    def __init__(self, monkeypatch, hit: Callable[[int], bool], act: Callable[[str], None]):
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
        if self.calls.hit(len(self.calls.names)):
            self.file.write(bytes(content)[: len(content) // 2])
            self.file.flush()
            self.calls.act("write")
        return self.file.write(content)


def replica(step):
    weights = {"w": torch.full((5,), float(step)), "running": torch.full((3,), float(step))}
    return SimpleNamespace(
        device=torch.device("cpu"), average=None, model=SimpleNamespace(state_dict=lambda: weights),
        optimizer=SimpleNamespace(state=lambda: {"momentum": {"w": weights["w"] + 0.5}}),
    )  # fmt: skip


def save(folder, step, keep=2):
    checkpoint.save(folder, replica(step), checkpoint.State(step, "recipe", "data"), keep)


def prepared(folder, kind) -> int:
    """What is there before; returns the step of the newest good one."""
    before = {"first": [], "next": [1], "prune": [1, 2], "torn": [1, 2], "two": [1]}[kind]
    for step in before:
        save(folder, step)
    if kind == "torn":
        os.truncate(folder.checkpoints / "step-00000002" / "weights.pt", 40)
        return 1
    return max(before, default=0)


def act(folder, kind) -> int:
    """The saves that are disturbed; returns the last one's step."""
    if kind == "two":
        writer = Writer(folder, 1, 60.0, print)
        for step in (2, 3):
            writer.save(replica(step), checkpoint.State(step, "recipe", "data"))
        writer.wait()
        return 3
    step = {"first": 1, "next": 2, "prune": 3, "torn": 2}[kind]
    save(folder, step, keep=1 if kind == "prune" else 2)
    return step


def check(folder, good, last):
    """The newest whole one is `good` or newer, has its own weights, and the next start uses the folder."""
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


def copies(tmp_path, kind):
    """The folder before, as often as it is wanted."""
    good = prepared(RunFolder(tmp_path / "before"), kind)
    (tmp_path / "before").mkdir(exist_ok=True)
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


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_each_call_that_changes_the_disk(tmp_path, no_syncs, kind):
    last = {"first": 1, "next": 2, "prune": 3, "torn": 2, "two": 3}[kind]
    steps = []
    for number, folder, good in copies(tmp_path, kind):
        with pytest.MonkeyPatch.context() as patch:
            calls = Calls(patch, lambda n, at=number: n >= at, die)
            with contextlib.suppress(Killed, RunError):  # of a thread that dies the other one tells
                act(folder, kind)
        steps.append(check(folder, good, last))
        if len(calls.names) < number:
            break
    assert len(steps) > 30 and steps == sorted(steps) and steps[-1] == last


HINTS = {errno.ENOSPC: "make room", errno.EIO: "file system works again", errno.EROFS: "make the folder writable"}


@pytest.mark.parametrize("number_of, lasting", [(errno.ENOSPC, True), (errno.EROFS, True), (errno.EIO, False)])
@pytest.mark.parametrize("kind", KINDS)
def test_an_error_at_each_call_is_said_and_costs_no_good_one(tmp_path, no_syncs, kind, number_of, lasting):
    def fail(_):
        raise OSError(number_of, os.strerror(number_of))

    last = {"first": 1, "next": 2, "prune": 3, "torn": 2, "two": 3}[kind]
    said = 0
    for number, folder, good in copies(tmp_path, kind):
        with pytest.MonkeyPatch.context() as patch:
            calls = Calls(patch, (lambda n, at=number: n >= at) if lasting else number.__eq__, fail)
            try:
                act(folder, kind)
            except RunError as problem:
                said += 1
                assert "checkpoint at step" in str(problem) and "start again with --resume" in str(problem)
                assert HINTS[number_of] in str(problem), problem
        check(folder, good, last)
        if len(calls.names) < number:
            break
    assert said > 20


def test_durable_before_it_is_named(tmp_path, monkeypatch):
    """What a power cut leaves follows from the order: files, their folder, the name, its folder, and then LATEST."""
    order, path_of = [], lambda fd: os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))
    fsync, replace = os.fsync, os.replace

    def synced(fd):
        order.append(("sync", path_of(fd)))
        fsync(fd)

    def named(old, new):
        order.append(("name", os.path.basename(new)))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", named)
    save(RunFolder(tmp_path), 1)
    building = f".step-00000001.{os.getpid()}"
    place = {what: max(i for i, o in enumerate(order) if o == what) for what in order}
    whole = place["name", "step-00000001"]
    for file in ("weights.pt", "optimizer.pt"):
        assert place["sync", file] < place["sync", building] < whole
    assert place["name", "state.json"] < place["sync", building]
    assert ("sync", tmp_path.name) in order[:whole]  # the folder that has `checkpoints`
    assert order[whole + 1] == ("sync", "checkpoints") and order[-2:] == [("name", "LATEST"), ("sync", "checkpoints")]
    assert order[whole + 2][1].startswith(".LATEST.")

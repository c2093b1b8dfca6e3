"""A save that is killed, or fails, at each call that writes, syncs, renames, links or removes: the last good checkpoint
loads, and the folder goes on being used. Every call, not a sample of them."""

import contextlib
import errno
import os

import pytest
from saves import HINTS, KINDS, LAST, Calls, Killed, act, check, copies, die, save

from hpc_lbsgd.errors import RunError
from hpc_lbsgd.records import RunFolder


@pytest.fixture
def no_syncs(monkeypatch):
    """A killed process loses nothing that it wrote: syncs are counted, and cost nothing."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_each_call_that_changes_the_disk(tmp_path, no_syncs, kind):
    steps = []
    for number, folder, good in copies(tmp_path, kind):
        with pytest.MonkeyPatch.context() as patch:
            calls = Calls(patch, lambda n, at=number: n >= at, die)
            with contextlib.suppress(Killed, RunError):  # of a thread that dies the other one tells
                act(folder, kind)
        steps.append(check(folder, good, LAST[kind]))
        if len(calls.names) < number:
            break
    assert len(steps) > 30 and steps == sorted(steps) and steps[-1] == LAST[kind]


@pytest.mark.parametrize("number_of, lasting", [(errno.ENOSPC, True), (errno.EROFS, True), (errno.EIO, False)])
@pytest.mark.parametrize("kind", KINDS)
def test_an_error_at_each_call_is_said_and_costs_no_good_one(tmp_path, no_syncs, kind, number_of, lasting):
    def fail(_):
        raise OSError(number_of, os.strerror(number_of))

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
        check(folder, good, LAST[kind])
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

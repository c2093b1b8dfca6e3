"""One owner a run folder: who may take it, and that of many who try at once one gets it."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hpc_lbsgd import owner
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.lease import UNREACHABLE_S, Ask, Facts, Lease, Process, Verdict, judge
from hpc_lbsgd.owner import HANDED_ON, OwnerFile, check, take

HERE = Process("a", "boot", 7, 70)
BY_PROCESS = Lease("o1", "t1", "noon", "a", (HERE,))
IN_JOB = replace(BY_PROCESS, job="5", cluster="c")
BY_JOB = replace(IN_JOB, processes=())
TWO = replace(BY_PROCESS, processes=(HERE, HERE))
LONG = UNREACHABLE_S + 1


@pytest.mark.parametrize(
    "lease, ask, facts, verdict",
    [
        (None, Ask(), Facts(), Verdict.TAKE),
        (BY_PROCESS, Ask(), Facts((True,)), Verdict.REFUSE),
        (BY_PROCESS, Ask(), Facts((True,), idle_s=LONG), Verdict.REFUSE),  # stopped, but there
        (BY_PROCESS, Ask(), Facts((False,)), Verdict.FOLLOW),
        (BY_PROCESS, Ask(), Facts((None,)), Verdict.REFUSE),
        (BY_PROCESS, Ask(), Facts((None,), idle_s=LONG), Verdict.FOLLOW),
        (TWO, Ask(), Facts((False, True)), Verdict.REFUSE),  # launch was killed, its ranks are there
        (TWO, Ask(), Facts((False, None)), Verdict.REFUSE),
        (TWO, Ask(), Facts((False, None), idle_s=LONG), Verdict.FOLLOW),
        (BY_PROCESS, Ask("o1"), Facts((True,)), Verdict.SHARE),  # a rank of it
        (IN_JOB, Ask(), Facts((None,), job_there=False), Verdict.FOLLOW),
        (IN_JOB, Ask(), Facts((None,), job_there=True), Verdict.REFUSE),
        (IN_JOB, Ask(job="5", cluster="c"), Facts((None,)), Verdict.REFUSE),  # two in one allocation
        (IN_JOB, Ask(job="5", cluster="c", restart=1), Facts((None,)), Verdict.FOLLOW),
        (IN_JOB, Ask(job="5", cluster="d", restart=1), Facts((None,)), Verdict.REFUSE),
        (BY_JOB, Ask(), Facts(job_there=True, idle_s=LONG), Verdict.REFUSE),  # in the queue for weeks
        (BY_JOB, Ask(), Facts(job_there=None, idle_s=LONG), Verdict.REFUSE),  # Slurm cannot be asked
        (BY_JOB, Ask(), Facts(job_there=False), Verdict.FOLLOW),
        (BY_JOB, Ask(job="6", cluster="c", for_job=True), Facts(job_there=True), Verdict.REFUSE),  # an array's task
        (BY_JOB, Ask(job="5", cluster="c", restart=1, for_job=True), Facts(), Verdict.SHARE),  # queued again
        (BY_JOB, Ask(job="5", cluster="c"), Facts(), Verdict.REFUSE),  # by hand, beside the script
        (BY_JOB, Ask("o1", job="5", cluster="c"), Facts(), Verdict.SHARE),
    ],
)
def test_who_may_take_a_run_folder(lease, ask, facts, verdict):
    assert judge(lease, ask, facts) is verdict


def test_a_process_that_proc_hides_may_be_at_work(monkeypatch):
    """/proc with hidepid shows a user his own processes alone; what it hides is not gone."""
    other = replace(owner.this_process(), pid=2**22 + 1)  # no process has this number
    assert owner.alive(other) is False

    def kill(pid, signal):
        raise PermissionError

    monkeypatch.setattr(os, "kill", kill)
    assert owner.alive(other) is None


def test_a_process_of_which_nothing_can_be_read_is_not_gone(monkeypatch):
    """Nothing more can be opened here, or /proc hides what is ours, too."""
    mine, space = owner.this_process(), owner.space()

    def read_text(path):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(owner, "space", lambda: space)
    monkeypatch.setattr(Path, "read_text", read_text)
    assert owner.alive(mine) is None


def test_a_second_is_refused_by_name_and_nothing_changes(tmp_path):
    held = take(tmp_path / "run")
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in [*tmp_path.rglob("*")] if p.is_file()}
    folder_time = (tmp_path / "run").stat().st_mtime_ns
    for again in (take, check):
        said = rf"in use by process {os.getpid()} on \S+ since 20\d\d-.*remove .*owner.json"
        with pytest.raises(RequestError, match=said):
            again(tmp_path / "run")
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in before} == before
    assert (tmp_path / "run").stat().st_mtime_ns == folder_time
    held.release()
    assert not (tmp_path / "run").exists()
    take(tmp_path / "run").release()


def test_what_an_owner_starts_shares_it_and_the_last_gives_it_up(tmp_path, monkeypatch):
    first = take(tmp_path)
    (tmp_path / "there").touch()
    monkeypatch.setenv(HANDED_ON, first.lease.owner)
    rank = take(tmp_path)
    assert rank.lease.owner == first.lease.owner and len(rank.lease.processes) == 2
    monkeypatch.setattr(owner, "this_process", lambda: HERE)  # first is another process
    rank.release()
    assert OwnerFile(tmp_path).read()[0] == rank.lease
    first.release()
    assert os.listdir(tmp_path) == ["there"]


def test_a_job_passes_its_run_to_the_one_that_goes_on_with_it(tmp_path, monkeypatch):
    """PBS and Flux: it has another number, and waits in the queue for the end of this one."""
    monkeypatch.setenv("PBS_JOBID", "7.host")
    owner.own(tmp_path)
    token = OwnerFile(tmp_path).read()[0].owner
    owner.own(tmp_path, successor="8.host")
    lease = OwnerFile(tmp_path).read()[0]
    assert (lease.job, lease.scheduler, lease.held_by_job, lease.owner) == ("8.host", "pbs", True, token)
    with pytest.raises(RequestError, match="not this job's to pass on"):
        owner.own(tmp_path, successor="9.host")
    owner.own(tmp_path, ended_with=0)  # not its own any more
    monkeypatch.setattr(owner, "job_there", lambda lease: True)
    with pytest.raises(RequestError, match="in use by PBS job 8.host "):
        take(tmp_path)
    monkeypatch.setenv("PBS_JOBID", "8.host")
    assert take(tmp_path, for_job=True).lease.owner == token
    owner.own(tmp_path, ended_with=0)
    assert OwnerFile(tmp_path).read() is None


def test_a_lease_that_was_lost_is_noticed(tmp_path, monkeypatch):
    import queue

    said = queue.Queue()
    monkeypatch.setattr(owner, "RENEW_S", 0.05)
    held = take(tmp_path, on_lost=said.put)
    OwnerFile(tmp_path).follow(held.lease, replace(BY_PROCESS, token="t9"))
    assert "was taken over by process 7 on a" in said.get(timeout=10)
    held.release()
    assert OwnerFile(tmp_path).read()[0].owner == "o1"  # not ours to remove


def test_a_folder_whose_lease_nobody_can_read_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(owner.time, "sleep", lambda s: None)
    (tmp_path / "owner.json").write_text("{")
    with pytest.raises(RequestError, match="cannot be read: if nothing is at work"):
        take(tmp_path)


def test_a_bit_of_a_lease_makes_no_second_owner(tmp_path, monkeypatch):
    """Of its process, say, which would then be one that is gone."""
    monkeypatch.setattr(owner, "TRIES", 1)
    monkeypatch.setattr(owner.time, "sleep", lambda s: None)
    held = take(tmp_path)
    path = tmp_path / "owner.json"
    content = path.read_bytes()
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        with pytest.raises(RequestError, match="cannot be read|in use by"):
            take(tmp_path)
    for odd in ("[" * 100_000, json.dumps(held.lease.as_json() | {"scheduler": "none", "job": "7"}), "[1]", "null"):
        path.write_text(odd)
        with pytest.raises(RequestError, match="cannot be read: if nothing is at work"):
            take(tmp_path)
    path.write_bytes(content)
    held.release()
    assert not path.exists()


def test_a_link_to_nowhere_is_called_that(tmp_path):
    (tmp_path / "run").symlink_to(tmp_path / "purged" / "run")
    with pytest.raises(RequestError, match="run: is a link to what is not there"):
        take(tmp_path / "run")


def test_without_hard_links(tmp_path, monkeypatch):
    def link(source, target):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(owner.os, "link", link)
    held = take(tmp_path)
    with pytest.raises(RequestError, match="in use"):
        take(tmp_path)
    held.release()


# Takes the folder as often as it can for a while; whoever has it checks that it is alone. Some die with it.
CONTENDER = """
import os, random, sys, time
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.owner import take
folder, number, until = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
rng, taken = random.Random(number), 0
while time.time() < until:
    try:
        held = take(folder + "/run")
    except RequestError as problem:
        assert "in use by" in str(problem) or "same time" in str(problem), problem
        continue
    inside = os.open(folder + "/inside", os.O_CREAT | os.O_EXCL)  # fails where another is inside
    os.close(inside)
    time.sleep(rng.random() * 0.002)
    os.unlink(folder + "/inside")
    taken += 1
    if rng.random() > 0.3:
        held.release()
    elif os.fork():
        os._exit(0)  # the owner is dead, and another process goes on
print(taken)
"""


def test_of_many_at_the_same_time_one_gets_it(tmp_path):
    import time

    until = str(time.time() + 6)
    words = [sys.executable, "-c", CONTENDER, str(tmp_path)]
    jobs = [subprocess.Popen([*words, str(n), until], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for n in range(4)]  # fmt: skip
    ends = [job.communicate(timeout=60) for job in jobs]
    assert not any(error for _, error in ends), ends
    assert sum(int(n) for out, _ in ends for n in out.split()) > 2, ends

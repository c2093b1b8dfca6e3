"""A rank that stops is named in every phase; a phase that takes long is none of the watchdog's business."""

import queue
import socket
from types import SimpleNamespace

import pytest
import torch

from hpc_lbsgd.records import RunFolder
from hpc_lbsgd.train import watchdog
from hpc_lbsgd.train.evaluate import evaluate
from hpc_lbsgd.train.watchdog import LONG, Watchdog

TIMEOUT_S = 0.4


@pytest.mark.parametrize("phase", [*LONG, "sum"])
def test_a_silent_rank_is_named(tmp_path, phase):
    heard = queue.Queue()
    folder = RunFolder(tmp_path)
    gone = Watchdog(folder, 1, 2, 1000.0, lambda *_: None)
    gone.stop()
    there = Watchdog(folder, 0, 2, TIMEOUT_S, lambda *said: heard.put(said))
    there.enter(phase, 3)
    message, speaks, hosts = heard.get(timeout=30)
    there.stop()
    assert speaks and "Stalest: rank 1 on" in message and "no heartbeat" in message
    assert hosts == [socket.gethostname()]


def test_long_phases_may_take_long_where_all_beat(tmp_path):
    heard = queue.Queue()
    runs = {}
    for phase in (*LONG, "end"):  # beside one another, for each is waited out
        (tmp_path / phase).mkdir()
        folder = RunFolder(tmp_path / phase)
        runs[phase] = [Watchdog(folder, r, 2, TIMEOUT_S, lambda *said: heard.put(said)) for r in (0, 1)]
        for rank in runs[phase]:
            rank.enter(phase, 3)
    with pytest.raises(queue.Empty):
        heard.get(timeout=5 * TIMEOUT_S)
    runs["end"][1].enter("data", 2)  # and this one holds up the other
    message, *_ = heard.get(timeout=30)
    for ranks in runs.values():
        for rank in ranks:
            rank.stop()
    assert "Stalest: rank 1 on" in message and "alive, in phase 'data' of step 2" in message


def test_where_all_wait_for_one_another_it_is_the_network(tmp_path):
    heard = queue.Queue()
    ranks = [Watchdog(RunFolder(tmp_path), r, 2, TIMEOUT_S, lambda *said: heard.put(said)) for r in (0, 1)]
    for rank in ranks:
        rank.enter("sum", 7)
    message, *_ = heard.get(timeout=30)
    for rank in ranks:
        rank.stop()
    assert "rank 0 on" in message and "rank 1 on" in message, message
    assert "in phase 'sum' of step 7, for one another: the network between them" in message


def test_who_has_evaluated_waits_in_a_sum_which_is_bounded():
    """Where the network goes then, nobody evaluates any more, and all wait for one another."""
    seen = []
    engine = SimpleNamespace(rank=0, size=1, wait=lambda sum: None, start_sum=lambda *_: seen.append("sum"))
    replica = SimpleNamespace(engine=engine, device=torch.device("cpu"), outputs=lambda images: images,
                              model=SimpleNamespace(eval=lambda: None))  # fmt: skip

    def batches(requests):
        for _ in requests:
            seen.append("batch")
            yield torch.eye(2), torch.arange(2), 0

    loader = SimpleNamespace(batches=batches)
    metrics = {"loss": lambda outputs, labels: (outputs.sum(), len(labels))}
    found = evaluate(replica, loader, 4, 2, metrics, lambda: seen.append("waits"))
    assert seen == ["batch", "batch", "waits", "sum"] and found["accuracy"] == 1.0


def test_ranks_that_wait_for_a_checkpoint_wait_as_long_as_it_may_take(tmp_path, monkeypatch):
    """Rank 0 writes, the others are in the next step's sum. One that never ends is named, by one rank."""
    monkeypatch.setitem(LONG, "checkpoint", 12.0)
    heard = queue.Queue()

    def on_stall(rank):
        return lambda message, speaks, _: heard.put((rank, message, speaks))

    ranks = [Watchdog(RunFolder(tmp_path), r, 2, TIMEOUT_S, on_stall(r)) for r in (0, 1)]
    ranks[0].enter("checkpoint", 3)
    ranks[1].enter("sum", 3)
    with pytest.raises(queue.Empty):
        heard.get(timeout=8 * TIMEOUT_S)
    said = [heard.get(timeout=30)]
    while said[-1][0] != 0:  # rank 0 ends the job: whoever looks later finds it silent, and rightly
        said.append(heard.get(timeout=30))
    for rank in ranks:
        rank.stop()
    assert [rank for rank, _, speaks in said if speaks] == [0]
    assert all("Stalest: rank 0 on" in message and "in phase 'checkpoint'" in message for _, message, _ in said)


@pytest.mark.parametrize("suspended_at, seconds", [(20, 3600), (61, 3600), (63, 4)])
@pytest.mark.parametrize("ends", [True, False])
def test_time_in_which_the_process_was_stopped_is_nobodys(tmp_path, monkeypatch, suspended_at, seconds, ends):
    """`scontrol suspend`, a preemption by suspension, a laptop's lid: all ranks stand still, and the clock does not. A
    step that takes 280 s of 300 by itself ends afterwards. suspended_at: a wait of the watchdog's thread, of 5 s; from
    the 61st on it looks at others."""
    now, waits, told = [0.0], [0], []

    class Clock:
        def wait(self, seconds_):
            waits[0] += 1
            now[0] += seconds_ + seconds * (waits[0] == suspended_at)
            if ends and now[0] - seconds * (waits[0] >= suspended_at) >= 280 and dog._state[0] == "compute":
                dog.enter("sum", 4)
            return self.is_set()

        def is_set(self):
            return waits[0] > 100

    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: now[0], time=lambda: now[0]))
    nothing = SimpleNamespace(start=lambda: None)
    monkeypatch.setattr(watchdog, "threading", SimpleNamespace(Event=Clock, Thread=lambda **_: nothing))
    dog = Watchdog(RunFolder(tmp_path), 0, 1, 300.0, lambda message, *_: told.append(now[0]))
    dog.enter("compute", 3)
    dog._run()
    if ends:
        assert not told
    else:  # one that hangs is still told, by the time that was its own
        assert len(told) == 1 and 300 <= told[0] - seconds <= 360

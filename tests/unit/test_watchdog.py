"""A rank that stops is named in every phase; a phase that takes long is none of the watchdog's business."""

import queue
import socket
from types import SimpleNamespace

import pytest
import torch

from hpc_lbsgd.records import RunFolder
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

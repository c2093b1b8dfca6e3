"""Ranks that are slower than the others: who is named, when, and when nobody is."""

import numpy as np
import pytest

from hpc_lbsgd.records import RunFolder
from hpc_lbsgd.train.slow import HELD, WINDOW, SlowRanks
from hpc_lbsgd.train.stops import SPARE_NODES, Stops


def told(times, samples=8.0, ranks=None):
    """[(step, event, rank)] of a list of times by step."""
    ranks = SlowRanks([f"n{r}" for r in range(ranks or len(times[0]))])
    return [(i, event, facts["rank"]) for i, own in enumerate(times) for event, facts in ranks.step(own, samples)]


def test_a_rank_that_becomes_slow_is_named_once_within_20_steps_and_its_end_too():
    steps = [(0.01, 0.011, 0.01)] * 30 + [(0.01, 0.1, 0.01)] * 50 + [(0.01, 0.011, 0.01)] * 30
    (begun, *slow), (ended, *over) = told(steps)
    assert (slow, over) == (["slow", 1], ["slow-ended", 1])
    assert 30 <= begun < 50 and 80 <= ended < 100
    ((_, facts),) = [
        e for own in [SlowRanks(["a", "b"])] for _ in range(WINDOW + HELD) for e in own.step((0.01, 0.1), 8)
    ]
    assert facts == {"rank": 1, "host": "b", "times": 10.0, "own_s": 0.8, "median_s": 0.08}


@pytest.mark.parametrize("own", [(0.01, 0.1), (0.1, 0.01), (0.1, 0.01, 0.01, 0.01), (0.1, 0.01, 0.0)])
def test_of_two_ranks_too_and_those_without_samples_do_not_count(own):
    assert told([own] * 40) == [(WINDOW + HELD - 2, "slow", own.index(0.1))]


@pytest.mark.parametrize(
    "steps",
    [
        [(0.01, 0.015, 0.012)] * 40,
        [(0.01, 3.0 if step % 9 == 0 else 0.01, 0.01) for step in range(60)],  # hiccups
        [(0.0001, 0.0009, 0.0001)] * 40,  # of a rank that waits 6 ms nothing is told
        [(0.1,)] * 40,
        [(0.1, 0.0)] * 40,
    ],
)
def test_nothing_is_told_of_noise_of_one_rank_and_of_what_costs_nothing(steps):
    assert told(steps) == []


def test_ranks_that_take_turns_in_being_slow_do_not_fill_the_log():
    """Two ranks on cores that they share with others, a few milliseconds a step."""
    rng = np.random.default_rng(0)
    steps = []
    for _ in range(100):
        slow = int(rng.integers(2))
        steps += [tuple(0.02 if r == slow else 0.002 for r in range(2))] * int(rng.integers(5, 16))
    assert len(told(steps)) < len(steps) / 30


@pytest.mark.parametrize("spare, stops", [("1", True), ("0", False), (None, False)])
def test_a_slow_node_is_worth_a_stop_where_another_stands_by(spare, stops, monkeypatch, tmp_path):
    monkeypatch.delenv(SPARE_NODES, raising=False)
    if spare:
        monkeypatch.setenv(SPARE_NODES, spare)
    found = Stops(alone=False)
    found.watch(RunFolder(tmp_path), lead=True)
    found.for_spare()
    assert found.asked() is stops

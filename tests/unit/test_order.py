"""The order of samples: one global shuffle an epoch, a function of (seed, epoch)."""

import numpy as np
import pytest

from hpc_lbsgd.data.order import Permutation, passes_of_rank, worker_samples, workers_of_rank
from hpc_lbsgd.theory.schedule import Schedule, Stage, Warmup


@pytest.mark.parametrize("n", [1, 2, 3, 7, 1000, 65_535, 65_536, 65_537, 65_539, 66_049, 99_991, 1_281_167])
def test_is_a_bijection(n):
    """Both kinds, at their border, at primes, at squares and just above them (the most walking)."""
    found = Permutation(n, seed=3, epoch=5)[0:n]
    assert found.dtype == np.int64
    assert np.array_equal(np.sort(found), np.arange(n))


@pytest.mark.parametrize("n", [1000, 100_000])
def test_pieces_agree_with_the_whole_and_epochs_differ(n):
    p = Permutation(n, 0, 0)
    whole = p[0:n]
    assert np.array_equal(np.concatenate([p[i : i + 77] for i in range(0, n, 77)]), whole)
    assert np.array_equal(p[np.array([n - 1, 0, 5])], whole[[n - 1, 0, 5]])
    for other in (Permutation(n, 0, 1), Permutation(n, 1, 0)):
        assert np.mean(other[0:n] == whole) < 0.01


def test_huge_sets_need_no_array():
    n = 10**12
    found = Permutation(n, 0, 0)[10**11 : 10**11 + 4096]
    assert len(set(found.tolist())) == 4096
    assert found.min() >= 0 and found.max() < n
    assert abs(found.mean() / n - 0.5) < 0.03  # 4096 uniform values: sd 0.0045


@pytest.mark.parametrize("n", [60_000, 1_281_167])
def test_looks_like_a_fisher_yates_shuffle(n):
    """z-scores of four statistics over several epochs: a shuffle's are N(0, 1)."""
    scores = []
    for epoch in range(4):
        found = Permutation(n, 11, epoch)[0:n]
        place = np.arange(n)
        scores.append(np.corrcoef(place, found)[0, 1] * np.sqrt(n))
        scores.append(np.corrcoef(found[:-1], found[1:])[0, 1] * np.sqrt(n))
        grid = np.bincount(place * 64 // n * 64 + found * 64 // n, minlength=4096)
        scores.append((((grid - n / 4096) ** 2 / (n / 4096)).sum() - 63**2) / np.sqrt(2 * 63**2))
        steps = np.bincount((np.diff(found) % n) * 256 // n, minlength=256)
        scores.append((((steps - n / 256) ** 2 / (n / 256)).sum() - 255) / np.sqrt(2 * 255))
    assert np.abs(scores).max() < 4.5
    assert np.sqrt(np.mean(np.square(scores))) < 1.8


def test_small_shuffles_are_uniform():
    """All 24 orders of 4 samples, over 4800 seeds: chi-square with 23 degrees of freedom."""
    seen = {}
    for seed in range(4800):
        order = tuple(Permutation(4, seed, 0)[0:4].tolist())
        seen[order] = seen.get(order, 0) + 1
    assert len(seen) == 24
    assert sum((c - 200) ** 2 / 200 for c in seen.values()) < 60  # p < 1e-4


@pytest.mark.parametrize("workers", [1, 3, 16, 17])
@pytest.mark.parametrize("samples", [1, 2, 7, 203, 1000])
def test_each_sample_once_an_epoch(samples, workers):
    schedule = Schedule(samples, 8, [Stage(0, workers, 0.1, 0.9)], 2, "partial", Warmup(0, 0.1))
    for epoch in (0, 1):
        p = Permutation(samples, 0, epoch)
        first = schedule.first_step(epoch)
        drawn = [worker_samples(p, schedule.at(first + i), j)
                 for i in range(schedule.steps_in_epoch(epoch)) for j in range(workers)]  # fmt: skip
        assert np.array_equal(np.concatenate(drawn), p[0:samples])


def test_two_epochs_of_one_worker_overlap_only_by_chance():
    n, workers = 100_000, 10
    schedule = Schedule(n, 100, [Stage(0, workers, 0.1, 0.9)], 2, "drop", Warmup(0, 0.1))
    parts = []
    for epoch in (0, 1):
        p, first = Permutation(n, 0, epoch), schedule.first_step(epoch)
        parts.append({s for i in range(100) for s in worker_samples(p, schedule.at(first + i), 3).tolist()})
    shared = len(parts[0] & parts[1])  # hypergeometric: mean 1000, sd 28
    assert 850 < shared < 1150


def test_ranks_share_workers():
    for size in (1, 2, 3, 5, 20):
        assert sorted(j for r in range(size) for j in workers_of_rank(16, r, size)) == list(range(16))
    assert [list(p) for p in passes_of_rank(16, 1, 3, 2)] == [[1, 4], [7, 10], [13]]
    assert passes_of_rank(3, 4, 5, 1) == []

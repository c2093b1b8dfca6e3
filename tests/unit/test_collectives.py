"""The allreduce programs run in memory, against sums and closed forms; the cost models against the papers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_lbsgd.theory import allreduce, collectives
from hpc_lbsgd.theory.collectives import Link


def run(programs, buffers):
    """Run all ranks' programs to their end, messages passed by hand. Returns (steps, messages, bytes sent).

    Each step takes a rank one unit of time, and ends no earlier than the messages it waits for were sent and one unit
    has passed: the latest clock is the number of steps one after another.
    """
    size = len(programs)
    mail, position, sent = {}, [0] * size, [False] * size
    clock, messages, sent_bytes = [0] * size, 0, 0
    while any(position[r] < len(programs[r]) for r in range(size)):
        moved = False
        for r in range(size):
            if position[r] == len(programs[r]):
                continue
            step = programs[r][position[r]]
            if not sent[r]:
                for m in step.sends:
                    part = buffers[r][m.start : m.stop].copy()
                    mail.setdefault((r, m.peer), []).append((part, clock[r] + 1))
                    messages, sent_bytes = messages + 1, sent_bytes + part.nbytes
                sent[r] = moved = True
            if all(mail.get((m.peer, r)) for m in step.receives):
                clock[r] += 1
                for m in step.receives:
                    part, when = mail[m.peer, r].pop(0)
                    assert len(part) == m.stop - m.start
                    buffers[r][m.start : m.stop] = part + (buffers[r][m.start : m.stop] if m.add else 0)
                    clock[r] = max(clock[r], when)
                position[r], sent[r], moved = position[r] + 1, False, True
        assert moved, "every rank waits for a message that nobody sends"
    assert not any(mail.values()), "a message was never received"
    return max(clock), messages, sent_bytes


def integers(size, n, dtype=np.int64):
    return [np.random.default_rng(r).integers(-1000, 1000, n).astype(dtype) for r in range(size)]


def check(make, size, n):
    buffers = integers(size, n)
    expected = np.sum(buffers, axis=0)
    counted = run([make(r, size, n) for r in range(size)], buffers)
    assert all(np.array_equal(b, expected) for b in buffers)
    return counted


@pytest.mark.parametrize("name", list(allreduce.ALGORITHMS))
def test_sums_and_traffic_are_exact(name):
    """p = 1 to 17, 32, 33, 44: all ranks get the sum; steps, messages and bytes equal the formulas."""
    for size in (*range(1, 18), 32, 33, 44):
        if name == "halving-doubling" and size & (size - 1):
            continue
        for n in (0, 1, 7, 240):
            counted = check(allreduce.ALGORITHMS[name], size, n)
            assert counted == collectives.FORMULAS[name](size, 8 * n), (size, n)


@pytest.mark.parametrize("node_size", [1, 2, 4, 8])
@pytest.mark.parametrize("itemsize", [8, 2**20], ids=["small", "large"])
def test_three_phases_are_exact(node_size, itemsize):
    """Both ways inside a node; 840 elements, which 1 to 8 ranks divide."""
    for size in range(1, 18):
        steps, messages, sent = check(lambda r, p, n: allreduce.hierarchical(r, p, n, node_size, itemsize), size, 840)
        expected = collectives.hierarchical(size, 8 * 840, node_size, small=itemsize == 8)
        assert (messages, sent) == expected[1:]
        if size % node_size == 0 or size < node_size:
            assert steps == expected.steps


@given(st.integers(1, 40), st.integers(0, 100), st.integers(1, 9))
def test_any_size_any_length(size, n, node_size):
    check(allreduce.binary_blocks, size, n)
    check(allreduce.torus, size, n)
    check(lambda r, p, n: allreduce.hierarchical(r, p, n, node_size), size, n)


def test_papers_numbers():
    """Goyal et al. 2017, section 4: 10 steps by halving-doubling and 62 by ring on 32 servers; 2(p-1)/p b a server."""
    hd, ring = (f(32, 100_000_000) for f in (collectives.halving_doubling, collectives.ring))
    assert (hd.steps, ring.steps) == (10, 62)
    assert hd.sent_bytes == ring.sent_bytes == 32 * (2 * 31 / 32 * 100_000_000)
    assert collectives.binary_blocks(44, 1).steps == 2 * 5 + 2
    assert collectives.torus(16 * 16, 1).steps == 2 * 15 + 2 * 15


def test_halving_doubling_refuses_other_sizes():
    with pytest.raises(ValueError, match="12 ranks"):
        allreduce.halving_doubling(0, 12, 5)


def test_fit_finds_the_link_it_was_made_from():
    link = Link(5e-6, 1e-9)
    sizes = [2.0**i for i in range(10, 28)]
    times = [collectives.seconds(6, 4, b, link) for b in sizes]
    found = collectives.fit(6, 4, sizes, times)
    assert found == pytest.approx(link, rel=1e-6)
    assert collectives.bus_bandwidth(4, 1e12, collectives.seconds(6, 4, 1e12, link)) == pytest.approx(1e9, rel=1e-3)
    flat = collectives.fit(6, 4, sizes[:4], [1e-5] * 4)  # time that does not grow: no bandwidth below zero
    assert flat.alpha > 0 and flat.beta >= 0

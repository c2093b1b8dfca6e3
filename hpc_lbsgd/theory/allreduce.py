"""The papers' allreduce algorithms as message schedules: who sends which part to whom, in which order. Pure.

A program is one rank's list of steps; the messages of a step are under way together. Every algorithm exists once,
here: `bench/allreduce/collectives.py` runs the programs over MPI, tests run them in memory, and
`theory/collectives.py` has the closed forms that their counted messages must equal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

SWITCH_BYTES = 256 * 1024  # Goyal et al. 2017, section 4: inside a server, another way above this size


class Message(NamedTuple):
    """Elements [start, stop) of the buffer, to or from `peer`. add: what arrives is added, else it replaces."""

    peer: int
    start: int
    stop: int
    add: bool = False


class Step(NamedTuple):
    sends: tuple[Message, ...] = ()
    receives: tuple[Message, ...] = ()


Program = list[Step]


def chunks(start: int, stop: int, parts: int) -> list[tuple[int, int]]:
    """[start, stop) in `parts` runs whose lengths differ by at most one."""
    n = stop - start
    edges = [start + n * i // parts for i in range(parts + 1)]
    return list(zip(edges, edges[1:], strict=False))


# ---------------------------------------------------------------- building blocks, on a group of ranks


def ring_reduce_scatter(group: list[int], me: int, parts: list[tuple[int, int]]) -> Program:
    """Afterwards the i-th of the group holds the sum of part i: len(group) - 1 steps."""
    p, i = len(group), group.index(me)
    right, left = group[(i + 1) % p], group[(i - 1) % p]
    return [
        Step((Message(right, *parts[(i - s - 1) % p]),), (Message(left, *parts[(i - s - 2) % p], add=True),))
        for s in range(p - 1)
    ]


def ring_all_gather(group: list[int], me: int, parts: list[tuple[int, int]]) -> Program:
    """The i-th of the group starts with part i; afterwards all have all parts: len(group) - 1 steps."""
    p, i = len(group), group.index(me)
    right, left = group[(i + 1) % p], group[(i - 1) % p]
    return [
        Step((Message(right, *parts[(i - s) % p]),), (Message(left, *parts[(i - s - 1) % p]),)) for s in range(p - 1)
    ]


def halving(group: list[int], me: int, n: int) -> tuple[Program, list[tuple[int, int]]]:
    """Recursive halving in a power-of-two group: distance doubles from 1, data halve (Goyal et al. 2017, section 4).

    Returns the program and, by rank of the group, which part each holds afterwards.
    """
    q = len(group)
    ranges = [(0, n)] * q
    program: Program = []
    distance = 1
    while distance < q:
        after = []
        for j, (start, stop) in enumerate(ranges):
            lower, upper = chunks(start, stop, 2)
            after.append(upper if j & distance else lower)
        i = group.index(me)
        partner = i ^ distance
        # both have the same range before; each keeps its own half and sends the partner's
        program.append(
            Step((Message(group[partner], *after[partner]),), (Message(group[partner], *after[i], add=True),))
        )
        ranges = after
        distance *= 2
    return program, ranges


def doubling(reduce: Program) -> Program:
    """The all-gather that retraces a recursive halving: what was sent comes back summed."""
    return [
        Step(tuple(m._replace(add=False) for m in step.receives), tuple(m._replace(add=False) for m in step.sends))
        for step in reversed(reduce)
    ]


# ---------------------------------------------------------------- whole algorithms: (rank, size, elements) -> program


def ring(rank: int, size: int, n: int) -> Program:
    """Reduce-scatter and all-gather around one ring: 2(p-1) steps (Goyal et al. 2017: the bucket algorithm)."""
    group, parts = list(range(size)), chunks(0, n, size)
    return ring_reduce_scatter(group, rank, parts) + ring_all_gather(group, rank, parts)


def halving_doubling(rank: int, size: int, n: int) -> Program:
    """Recursive halving, then doubling: 2 log2(p) steps; p must be a power of two (ValueError)."""
    if size & (size - 1):
        raise ValueError(f"halving-doubling on {size} ranks: a power of two is needed; binary blocks take any number")
    down, _ = halving(list(range(size)), rank, n)
    return down + doubling(down)


def blocks_of(size: int) -> list[list[int]]:
    """Ranks in power-of-two blocks, the largest first."""
    found, first = [], 0
    for bit in reversed(range(size.bit_length())):
        if size >> bit & 1:
            found.append(list(range(first, first + 2**bit)))
            first += 2**bit
    return found


def binary_blocks(rank: int, size: int, n: int) -> Program:
    """Halving-doubling for any p: power-of-two blocks, joined in a chain from the smallest to the largest after the
    reduce-scatter, and back before the all-gather: two more steps (Goyal et al. 2017, section 4)."""
    blocks = blocks_of(size)
    b = next(i for i, block in enumerate(blocks) if rank in block)
    mine = blocks[b]
    i = mine.index(rank)
    down, ranges = halving(mine, rank, n)
    program = list(down)
    from_smaller: tuple[Message, ...] = ()
    if b + 1 < len(blocks):
        # blocks halve alike, so that my part lies inside that of the smaller block's rank with the same low bits
        smaller = blocks[b + 1]
        from_smaller = (Message(smaller[i % len(smaller)], *ranges[i], add=True),)
        program.append(Step(receives=from_smaller))
    if b > 0:
        larger = blocks[b - 1]
        _, theirs = halving(larger, larger[0], n)
        below = tuple(Message(larger[j], *theirs[j]) for j in range(len(larger)) if j % len(mine) == i)
        program += [Step(sends=below), Step(receives=below)]
    if from_smaller:
        program.append(Step(sends=from_smaller))
    return program + doubling(down)


def hierarchical(rank: int, size: int, n: int, node_size: int, itemsize: int = 4) -> Program:
    """Three phases (Goyal et al. 2017, section 4): sum on each node's first rank, binary blocks between those, and
    a broadcast on each node. Nodes are `node_size` consecutive ranks; the last may be smaller.

    Buffers below 256 KB go straight to the first rank and back; others by ring reduce-scatter and gather, and back by
    scatter and ring all-gather, which use every link of the node.
    """
    first = rank // node_size * node_size
    node = list(range(first, min(first + node_size, size)))
    leaders = list(range(0, size, node_size))
    parts = chunks(0, n, len(node))
    small = n * itemsize < SWITCH_BYTES
    inside = [] if small else ring_reduce_scatter(node, rank, parts)
    back = [] if small else ring_all_gather(node, rank, parts)
    what = [(0, n)] * len(node) if small else parts
    others = [(r, what[i]) for i, r in enumerate(node) if r != first]
    if rank != first:
        mine = Message(first, *what[node.index(rank)])
        return [*inside, Step(sends=(mine,)), Step(receives=(mine,)), *back]
    arriving = Step(receives=tuple(Message(r, *part, add=small) for r, part in others))
    leaving = Step(sends=tuple(Message(r, *part) for r, part in others))
    between = [renumbered(step, leaders) for step in binary_blocks(leaders.index(rank), len(leaders), n)]
    return [*inside, arriving, *between, leaving, *back] if others else between


def renumbered(step: Step, ranks: list[int]) -> Step:
    """A step among the members of a group, in ranks of the whole."""
    return Step(*(tuple(m._replace(peer=ranks[m.peer]) for m in messages) for messages in step))


def torus_shape(size: int) -> tuple[int, int]:
    """(X, Y): ranks in a row and in a column, as square as `size` allows; a prime gives one row."""
    y = max(d for d in range(1, int(size**0.5) + 1) if size % d == 0)
    return size // y, y


def torus(rank: int, size: int, n: int) -> Program:
    """Reduce-scatter along rows, allreduce along columns, all-gather along rows: 2(X-1) + 2(Y-1) steps
    (Mikami et al. 2018)."""
    x, y = torus_shape(size)
    row, column = [rank // x * x + i for i in range(x)], [rank % x + x * j for j in range(y)]
    parts = chunks(0, n, x)
    mine = chunks(*parts[rank % x], y)
    return [
        *ring_reduce_scatter(row, rank, parts),
        *ring_reduce_scatter(column, rank, mine),
        *ring_all_gather(column, rank, mine),
        *ring_all_gather(row, rank, parts),
    ]


ALGORITHMS: dict[str, Callable[[int, int, int], Program]] = {
    "ring": ring,
    "halving-doubling": halving_doubling,
    "binary-blocks": binary_blocks,
    "torus": torus,
}

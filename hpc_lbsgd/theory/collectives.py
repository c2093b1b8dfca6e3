"""What an allreduce costs, in closed form: steps, messages, bytes, and seconds in the alpha-beta-gamma model.

Every formula is for p ranks and b bytes. PAPERS that give them: Goyal et al. 2017, section 4 (ring, halving-doubling,
binary blocks), Mikami et al. 2018 (torus), Thakur et al. 2005 (the time model).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hpc_lbsgd.theory.allreduce import blocks_of, torus_shape


class Traffic(NamedTuple):
    """Of one allreduce: steps one after another; messages and bytes sent, over all ranks."""

    steps: int
    messages: int
    sent_bytes: int


def ring(p: int, b: int) -> Traffic:
    """2(p-1) steps, in each of which every rank sends b/p."""
    return Traffic(2 * (p - 1), 2 * (p - 1) * p, 2 * (p - 1) * b)


def halving_doubling(p: int, b: int) -> Traffic:
    """2 log2(p) steps; each rank sends b/2, b/4, ... and then the same back: 2 (p-1)/p b."""
    doublings = (p - 1).bit_length()
    return Traffic(2 * doublings, 2 * doublings * p, 2 * (p - 1) * b)


def binary_blocks(p: int, b: int) -> Traffic:
    """Halving-doubling in each power-of-two block, and two more steps where there is more than one: each rank of a
    block exchanges its part with one rank of the next smaller."""
    sizes = [len(block) for block in blocks_of(p)]
    inside = [halving_doubling(q, b) for q in sizes]
    more = 2 if len(sizes) > 1 else 0
    between = 2 * sum(sizes[:-1])  # up and down; a block's ranks together exchange b
    return Traffic(
        inside[0].steps + more,
        sum(t.messages for t in inside) + between,
        sum(t.sent_bytes for t in inside) + 2 * (len(sizes) - 1) * b,
    )


def torus(p: int, b: int) -> Traffic:
    """2(X-1) + 2(Y-1) steps on X x Y ranks, in each of which every rank sends; 2(p-1) b bytes, as the ring."""
    x, y = torus_shape(p)
    steps = 2 * (x - 1) + 2 * (y - 1)
    return Traffic(steps, steps * p, 2 * (p - 1) * b)


def hierarchical(p: int, b: int, node_size: int, small: bool) -> Traffic:
    """On each node of g ranks, up and down: g-1 whole buffers (small), or a ring of g-1 steps each way and all parts
    but one gathered and scattered; binary blocks between the nodes' first ranks. Steps: of the largest node.

    Bytes are exact where the number of ranks on a node divides the elements.
    """
    nodes = [min(node_size, p - first) for first in range(0, p, node_size)]
    between = binary_blocks(len(nodes), b)
    if small:
        messages = sum(2 * (g - 1) for g in nodes)
        sent = sum(2 * (g - 1) * b for g in nodes)
        steps = 2 if nodes[0] > 1 else 0
    else:
        messages = sum(2 * g * (g - 1) + 2 * (g - 1) for g in nodes)
        sent = sum(2 * (g - 1) * b + 2 * (g - 1) * b // g for g in nodes)
        steps = 2 * (nodes[0] - 1) + (2 if nodes[0] > 1 else 0)
    return Traffic(steps + between.steps, messages + between.messages, sent + between.sent_bytes)


FORMULAS = {"ring": ring, "halving-doubling": halving_doubling, "binary-blocks": binary_blocks, "torus": torus}


class Link(NamedTuple):
    """alpha: seconds a message; beta: seconds a byte sent; gamma: seconds a byte added up."""

    alpha: float
    beta: float
    gamma: float = 0.0


def seconds(steps: int, p: int, b: float, link: Link) -> float:
    """T = steps alpha + 2 (p-1)/p b beta + (p-1)/p b gamma (Thakur et al. 2005), for the bandwidth-optimal
    algorithms: ring, halving-doubling, torus."""
    share = (p - 1) / p
    return steps * link.alpha + 2 * share * b * link.beta + share * b * link.gamma


def bus_bandwidth(p: int, b: float, time_s: float) -> float:
    """Bytes a second over each rank's link, whatever p: 2 (p-1)/p b / T (the bus bandwidth of nccl-tests)."""
    return 2 * (p - 1) / p * b / time_s


def fit(steps: int, p: int, sizes: Sequence[float], times: Sequence[float]) -> Link:
    """alpha and beta from measured (bytes, seconds) of one algorithm, by least squares on relative errors.

    A measurement with one p cannot tell the cost of adding from that of sending, so beta holds both and gamma is 0.
    Neither is allowed below zero.
    """
    if p < 2 or len(sizes) < 2:
        raise ValueError(f"fit of {len(sizes)} sizes on {p} ranks: at least 2 of each are needed")
    seconds_each = np.asarray(times, dtype=float)
    columns = np.stack([np.full(len(times), float(steps)), 2 * (p - 1) / p * np.asarray(sizes, dtype=float)], axis=1)
    rows = columns / seconds_each[:, None]
    both, *_ = np.linalg.lstsq(rows, np.ones(len(times)), rcond=None)
    if min(both) >= 0:
        return Link(*map(float, both))
    alone = [float(rows[:, i].sum() / (rows[:, i] ** 2).sum()) for i in (0, 1)]
    errors = [float(((rows[:, i] * alone[i] - 1) ** 2).sum()) for i in (0, 1)]
    return Link(alone[0], 0.0) if errors[0] <= errors[1] else Link(0.0, alone[1])

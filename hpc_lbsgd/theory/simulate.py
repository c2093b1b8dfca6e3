"""One training step on any number of nodes, as events: gradients become ready, leave at a cycle's tick in fused
messages, pass the links in order, and the step ends when the slowest node has computed and the last sum is there.

All ranks of the model do the same, so an event stands for all of them and 4,096 nodes cost no more than two. What it
leaves out: contention between jobs, routing, and compute that slows down while it communicates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import NamedTuple

from hpc_lbsgd.theory.collectives import binary_blocks

ALGORITHMS = ("ring", "tree", "nccl", "hierarchical", "torus")
KNEE_EFFICIENCY = 0.9  # the knee is where efficiency falls below this
MOST_NODES = 4096
COMPUTED_BYTES = 4  # of a gradient's element, before it is cast for the wire


class Layer(NamedTuple):
    """A layer's parameters (elements) and forward FLOP an image."""

    parameters: int
    flop: float


@dataclass(frozen=True)
class Workload:
    """What one rank computes in a step, alone. Layers in forward order; backward's time goes by their FLOP."""

    layers: tuple[Layer, ...]
    samples: int  # a rank and step
    forward_s: float
    backward_s: float
    other_s: float = 0.0  # update and whatever else is there on one rank; after the sums, it does not overlap them

    @property
    def compute_s(self) -> float:
        return self.forward_s + self.backward_s + self.other_s

    @property
    def parameters(self) -> int:
        return sum(layer.parameters for layer in self.layers)


class Protocol(NamedTuple):
    """A way to send a message: seconds a hop between and inside nodes, and the share of the bandwidth that it may use.
    NCCL has several and takes for each message the one it expects to be fastest; so does the model."""

    inter_latency_s: float
    intra_latency_s: float
    bandwidth_share: float = 1.0


@dataclass(frozen=True)
class Cluster:
    """Nodes of ranks. Bandwidths are line rates in bytes a second and direction: `inter` of a node's all network
    ports, `intra` of a rank's link to the others of its node."""

    ranks_per_node: int
    inter: float
    intra: float
    protocols: tuple[Protocol, ...]
    images_per_s: float = math.inf  # that a node's input can deliver
    cores: int | None = None  # CPU ranks: cores of a node, which its ranks share when there are more of them
    crowding: float = 1.0  # CPU ranks: compute time of a rank when every core has one, over that of a rank alone

    @property
    def ranks_per_core(self) -> float:
        return max(1.0, self.ranks_per_node / self.cores) if self.cores else 1.0

    @property
    def compute_factor(self) -> float:
        """How much longer a rank computes than alone: for its share of a core, and for memory and caches that all
        cores use, which grows with the cores in use."""
        if not self.cores or self.cores < 2:
            return self.ranks_per_core
        in_use = min(1.0, (self.ranks_per_node - 1) / (self.cores - 1))
        return self.ranks_per_core * (1 + (self.crowding - 1) * in_use)


@dataclass(frozen=True)
class Method:
    """How gradients travel.

    algorithm: ring (all ranks in one), tree, nccl (the faster of the two by message, as NCCL since 2.4), hierarchical
    (Goyal et al. 2017: node sum, halving-doubling or binary blocks between nodes, broadcast) or torus (Mikami et al.
    2018; Horovod's hierarchical mode).
    bucket_bytes: gradients gather in static groups of this size, the first of first_bucket_bytes; 0: a tensor each.
    fusion_bytes: what is ready at a tick leaves in messages of up to this size; 0: a message a group.
    """

    algorithm: str
    bucket_bytes: float = 0.0
    first_bucket_bytes: float = 0.0
    fusion_bytes: float = 0.0
    cycle_s: float = 0.0
    item_bytes: int = 4
    overlap: bool = True


@dataclass(frozen=True)
class Fitted:
    """The two numbers that no data sheet has; one pair for every system.

    straggler: standard deviation of a node's compute time, relative, from step to step
    protocol_efficiency: share of a link's line rate that an allreduce gets
    """

    straggler: float
    protocol_efficiency: float


@dataclass(frozen=True)
class System:
    workload: Workload
    cluster: Cluster
    method: Method
    fitted: Fitted


class Outcome(NamedTuple):
    """Seconds of one step. step = compute of the slowest node + exposed communication + waiting for input."""

    step_s: float
    compute_s: float
    straggler_s: float  # part of compute: the slowest node's more than the mean
    exposed_comm_s: float
    input_wait_s: float
    comm_s: float  # the busiest link's time
    messages: int


# ---------------------------------------------------------------- one step


def slowest_of(nodes: int) -> float:
    """Expected largest of `nodes` standard normal values (Blom 1958), 0 for one: a synchronous step waits for it."""
    return NormalDist().inv_cdf((nodes - 0.375) / (nodes + 0.25))


def phases(system: System, nodes: int, message_bytes: float) -> list[float]:
    """Seconds that one message holds each link in turn: ring and tree have one phase; the others up, across, down."""
    chosen = system.method.algorithm
    algorithms = ("ring", "tree") if chosen == "nccl" else (chosen,)
    ways = [(a, p) for a in algorithms for p in system.cluster.protocols]
    return min((phases_by(system, nodes, message_bytes, *way) for way in ways), key=sum)


def phases_by(system: System, nodes: int, message_bytes: float, algorithm: str, protocol: Protocol) -> list[float]:
    c, g, p = system.cluster, system.cluster.ranks_per_node, nodes * system.cluster.ranks_per_node
    usable = system.fitted.protocol_efficiency * protocol.bandwidth_share
    inter, intra = c.inter * usable, c.intra * usable
    if p == 1:
        return [0.0]
    if algorithm in ("ring", "tree"):
        slowest = min(inter if nodes > 1 else math.inf, intra if g > 1 else math.inf)
        # NCCL's own latency model (graph/tuning.cc): of the ring's 2(p-1) steps 2(nodes-1) cross between nodes; a tree
        # goes through a node as a chain and over nodes in log2 steps, there and back
        crossing, inside = (nodes - 1, p - nodes) if algorithm == "ring" else ((nodes - 1).bit_length(), g - 1)
        latency = 2 * crossing * protocol.inter_latency_s + 2 * inside * protocol.intra_latency_s
        return [latency + 2 * (p - 1) / p * message_bytes / slowest]
    across = 2 * (nodes - 1) / nodes * message_bytes / inter
    if algorithm == "hierarchical":
        there = (g - 1) * protocol.intra_latency_s + (message_bytes / intra if g > 1 else 0.0)
        return [there, binary_blocks(nodes, 0).steps * protocol.inter_latency_s + across, there]
    if algorithm == "torus":
        there = (g - 1) * protocol.intra_latency_s + (g - 1) / g * message_bytes / intra
        return [there, 2 * (nodes - 1) * protocol.inter_latency_s + across, there]
    raise ValueError(f"algorithm {algorithm!r}: {', '.join(ALGORITHMS)}")


def negotiation_s(cluster: Cluster, nodes: int) -> float:
    """A word to the coordinator and back, over trees: how Horovod learns what every rank has ready."""
    inter, intra = (min(p[i] for p in cluster.protocols) for i in (0, 1))
    return 2 * ((nodes - 1).bit_length() * inter + (cluster.ranks_per_node - 1).bit_length() * intra)


def groups(workload: Workload, method: Method) -> list[tuple[float, float]]:
    """(bytes on the wire, share of backward that is done when the group is ready), in the order backward finishes
    them. Groups are cut by the size of the gradients as computed, whatever the wire."""
    total = sum(layer.flop for layer in workload.layers) or 1.0
    found: list[tuple[float, float]] = []
    elements, done = 0, 0.0
    for layer in reversed(workload.layers):
        done += layer.flop / total
        elements += layer.parameters
        limit = method.bucket_bytes if found else min(method.bucket_bytes, method.first_bucket_bytes or math.inf)
        if elements and elements * COMPUTED_BYTES >= limit:
            found.append((float(elements * method.item_bytes), done))
            elements = 0
    if elements:
        found.append((float(elements * method.item_bytes), 1.0))
    return found


def messages(ready: list[tuple[float, float]], method: Method) -> Iterable[tuple[float, float]]:
    """(bytes, time of leaving) from (bytes, time of being ready): at each tick what is ready leaves, fused."""

    def tick(t: float) -> float:
        return math.ceil(t / method.cycle_s - 1e-9) * method.cycle_s if method.cycle_s else t

    size, leaves = 0.0, None
    for group_bytes, t in ready:
        if leaves is not None and (tick(t) > leaves or size + group_bytes > method.fusion_bytes):
            yield size, leaves
            size = 0.0
        size, leaves = size + group_bytes, tick(t)
    if leaves is not None:
        yield size, leaves


def step(system: System, nodes: int) -> Outcome:
    """One step on so many nodes, of the mean length that the slowest node allows."""
    w, c, m = system.workload, system.cluster, system.method
    slow = c.compute_factor * (1 + system.fitted.straggler * slowest_of(nodes))
    backward_end = slow * (w.forward_s + w.backward_s)
    ready = [
        (b, slow * (w.forward_s + share * w.backward_s) if m.overlap else backward_end) for b, share in groups(w, m)
    ]
    free: list[float] = []  # when each phase's link is free again
    busy: list[float] = []
    count, end = 0, backward_end
    if nodes * c.ranks_per_node > 1:
        negotiation = negotiation_s(c, nodes) if m.cycle_s else 0.0
        for size, leaves in messages(ready, m):
            at = leaves + negotiation
            # CPU ranks copy and add with the cores that they share
            lasting = [c.ranks_per_core * seconds for seconds in phases(system, nodes, size)]
            free, busy = free or [0.0] * len(lasting), busy or [0.0] * len(lasting)
            for i, seconds in enumerate(lasting):
                at = free[i] = max(at, free[i]) + seconds
                busy[i] += seconds
            count, end = count + 1, max(end, at)
    compute = slow * w.compute_s
    exposed = end - backward_end
    input_wait = max(0.0, w.samples * c.ranks_per_node / c.images_per_s - compute - exposed)
    total = compute + exposed + input_wait
    straggling = compute - c.compute_factor * w.compute_s
    return Outcome(total, compute, straggling, exposed, input_wait, max(busy, default=0.0), count)


# ---------------------------------------------------------------- questions


def efficiency(system: System, nodes: int, baseline_ranks: int) -> float:
    """Images/s a rank on `nodes` nodes over images/s a rank on `baseline_ranks` ranks (1, or whole nodes)."""
    return baseline_step_s(system, baseline_ranks) / step(system, nodes).step_s


def baseline_step_s(system: System, ranks: int) -> float:
    g = system.cluster.ranks_per_node
    if ranks % g == 0:
        return step(system, ranks // g).step_s
    if ranks < g:
        part = replace(system.cluster, ranks_per_node=ranks, images_per_s=system.cluster.images_per_s * ranks / g)
        return step(replace(system, cluster=part), 1).step_s
    raise ValueError(f"baseline of {ranks} ranks: fewer than a node's {g}, or a multiple")


def without(system: System, limit: str) -> System:
    """The same system with one limit taken away: stragglers, bandwidth, latency or input."""
    c = system.cluster
    if limit == "stragglers":
        return replace(system, fitted=replace(system.fitted, straggler=0.0))
    if limit == "bandwidth":
        return replace(system, cluster=replace(c, inter=math.inf, intra=math.inf))
    if limit == "latency":
        cluster = replace(c, protocols=(Protocol(0.0, 0.0),))
        return replace(system, cluster=cluster, method=replace(system.method, cycle_s=0.0))
    if limit == "input":
        return replace(system, cluster=replace(c, images_per_s=math.inf))
    raise ValueError(f"limit {limit!r}: {', '.join(LIMITS)}")


LIMITS = ("stragglers", "bandwidth", "latency", "input")


def costs(system: System, nodes: int) -> dict[str, float]:
    """Seconds of a step that each limit costs: what the step would be shorter without it. They need not add up."""
    now = step(system, nodes).step_s
    return {limit: now - step(without(system, limit), nodes).step_s for limit in LIMITS}


def knee(system: System, baseline_ranks: int) -> tuple[int, str] | None:
    """(nodes, limit): the first number of nodes below 90 % efficiency, and the limit that costs most there; None where
    4,096 nodes do not reach it."""

    def below(nodes: int) -> bool:
        return efficiency(system, nodes, baseline_ranks) < KNEE_EFFICIENCY

    high = 1
    while not below(high):
        high *= 2
        if high > MOST_NODES:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if below(middle) else (middle, high)
    limits = costs(system, high)
    return high, max(limits, key=lambda limit: limits[limit])


def what_if(system: System) -> dict[str, System]:
    """The same system with one choice changed, by what was changed."""
    m = system.method
    found = {}
    if m.item_bytes == 8:
        found["fixed_point int32"] = replace(system, method=replace(m, item_bytes=4))
    if m.item_bytes > 2:
        found["wire fp16"] = replace(system, method=replace(m, item_bytes=2))
    for algorithm in ALGORITHMS:
        if algorithm != m.algorithm:
            found[f"algorithm {algorithm}"] = replace(system, method=replace(m, algorithm=algorithm))
    for mb in (1, 5, 25, 100):
        if m.bucket_bytes != mb * 2**20:
            method = replace(m, bucket_bytes=mb * 2.0**20, first_bucket_bytes=2.0**20, fusion_bytes=0.0)
            found[f"buckets of {mb} MB"] = replace(system, method=method)
    if m.overlap:
        found["no overlap"] = replace(system, method=replace(m, overlap=False))
    return found


def required_gbit_per_s(system: System) -> float:
    """Line rate of a node's network that hides the allreduce behind backward: Goyal's 2 b / backward, over the
    protocol's efficiency. For one ring or one message a node: the node's ranks share it."""
    w = system.workload
    gradient_bytes = w.parameters * system.method.item_bytes
    return 2 * gradient_bytes * 8 / w.backward_s / 1e9 / system.fitted.protocol_efficiency

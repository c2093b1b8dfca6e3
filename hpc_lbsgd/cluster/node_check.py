"""`doctor --nodes`: some seconds on each node before hours are spent. Every rank computes, copies and reads, nodes send
to one another, and who is far below the rest is named.

python -m hpc_lbsgd.cluster.node_check [--read PATH]     one rank of it, under mpirun, srun or torchrun; rank 0 prints a
                                                         line of JSON to stdout, and a line a slow rank to stderr
"""

from __future__ import annotations

import argparse
import os
import random
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from statistics import median, median_high
from typing import NamedTuple

from hpc_lbsgd.cluster import check_ranks
from hpc_lbsgd.schedulers import known

BURSTS, BURST_S = 5, 0.2  # the best of several: what a machine can do, whoever disturbs it now and then
READ_BYTES, FILES = 2**26, 64
SENT_BYTES = 2**22
MOST_ROUNDS = 31  # of pairs; more nodes than that are paired with some of the others


class Measure(NamedTuple):
    """What is measured on each rank, and below which share of the median it is called slow."""

    what: str
    unit: str
    scale: float  # of the unit
    least: float


COMPUTE = Measure("matrix product", "TFLOP/s", 1e12, 0.7)
COPY = Measure("copy in memory", "GB/s", 1e9, 0.6)
DEVICE = Measure("copy to the GPU", "GB/s", 1e9, 0.6)
READ = Measure("read of the data", "MB/s", 1e6, 0.3)
PAIRS = Measure("sending to others", "MB/s", 1e6, 0.4)
MEASURES = {m.what: m for m in (COMPUTE, COPY, DEVICE, READ, PAIRS)}


def told(what: str, rate: float) -> str:
    m = MEASURES[what]
    return f"{what} {rate / m.scale:.3g} {m.unit}"


class Slow(NamedTuple):
    host: str
    rank: int
    what: str
    value: float  # in the unit a second
    typical: float  # the median over ranks
    unit: str

    def __str__(self) -> str:
        share = self.value / self.typical
        return f"{self.host}, rank {self.rank}: {self.what} {self.value:.3g} {self.unit}, {share:.0%} of the median"


def slow_ones(hosts: Sequence[str], found: Sequence[dict[str, float]]) -> list[Slow]:
    """Ranks that are far below the median of all. hosts, found: by rank; found: by what is measured. Pure."""
    slow = []
    for what, (_, unit, scale, least) in MEASURES.items():
        values = {rank: facts[what] / scale for rank, facts in enumerate(found) if what in facts}
        if len(values) < 2:
            continue
        typical = median_high(values.values())
        slow += [Slow(hosts[r], r, what, v, typical, unit) for r, v in values.items() if v < least * typical]
    return slow


def pairs(places: int) -> Iterator[list[int]]:
    """Rounds in which each of `places` meets another: its partner by place, itself where it has none. Over all
    rounds everybody meets everybody once (the circle method)."""
    seats = list(range(places + places % 2))
    for _ in range(len(seats) - 1):
        partner = list(range(places))
        for a, b in zip(seats[: len(seats) // 2], reversed(seats[len(seats) // 2 :]), strict=True):
            if max(a, b) < places:
                partner[a], partner[b] = b, a
        yield partner
        seats = [seats[0], seats[-1], *seats[1:-1]]


# ---------------------------------------------------------------- one rank


def best(work: Callable[[], float]) -> float:
    """Units a second that `work` does, which returns how many; in the best of several bursts."""
    work()
    rates = []
    for _ in range(BURSTS):
        started, done = time.perf_counter(), 0.0
        while (passed := time.perf_counter() - started) < BURST_S:
            done += work()
        rates.append(done / passed)
    return max(rates)


def computing(device) -> dict[str, float]:
    """Rates of the processor or GPU, and of its memory."""
    import torch

    gpu = device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if gpu else (512, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    memory = torch.empty(2**28 if gpu else 2**24, dtype=torch.uint8, device=device)
    target = torch.empty_like(memory)

    def finished(count: float) -> float:
        if gpu:
            torch.cuda.synchronize()
        return count

    def product() -> float:
        torch.matmul(a, b)
        return finished(2.0 * size**3)

    def copy() -> float:
        target.copy_(memory)
        return finished(memory.numel())

    found = {COMPUTE.what: best(product), COPY.what: best(copy)}
    if gpu:
        pinned = torch.empty(2**26, dtype=torch.uint8, pin_memory=True)

        def to_device() -> float:
            memory[: pinned.numel()].copy_(pinned, non_blocking=True)
            return finished(pinned.numel())

        found[DEVICE.what] = best(to_device)
    return found


def reading(path: Path, rank: int) -> float:
    """Bytes a second from files below `path`, those of this rank's own choice, and not from the page cache."""
    files = [path] if path.is_file() else list(islice((p for p in path.rglob("*") if p.is_file()), 100 * FILES))
    rng, read, started = random.Random(rank), 0, time.perf_counter()
    for file in rng.sample(files, min(FILES, len(files))):
        with open(file, "rb", buffering=0) as f:
            size = os.fstat(f.fileno()).st_size
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            f.seek(rng.randrange(max(size - READ_BYTES // FILES, 0) + 1))
            read += len(f.read(READ_BYTES // FILES))
    return read / (time.perf_counter() - started)


def sending(engine, device, leaders: Sequence[int]) -> float | None:
    """Bytes a second to other nodes, the median over partners; collective. leaders: a rank of each node."""
    import torch

    mine, theirs = (torch.zeros(SENT_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    rates = []
    for partners in islice(pairs(len(leaders)), MOST_ROUNDS):
        engine.barrier()
        if engine.rank not in leaders:
            continue
        partner = leaders[partners[leaders.index(engine.rank)]]
        if partner == engine.rank:
            continue
        for _ in range(3):
            started = time.perf_counter()
            engine.exchange(mine, theirs, partner)
            if device.type == "cuda":
                torch.cuda.synchronize()
            passed = time.perf_counter() - started
        rates.append(SENT_BYTES / passed)
    engine.barrier()
    return median(rates) if rates else None


def one_rank(read: Path | None) -> None:
    """Collective over all ranks of the job."""
    import torch

    from hpc_lbsgd.parallel import world as worlds
    from hpc_lbsgd.parallel.engine import own_cores
    from hpc_lbsgd.parallel.torch_engine import TorchEngine
    from hpc_lbsgd.sections import Machine

    world = worlds.from_environment()
    gpu = torch.cuda.is_available() and torch.cuda.device_count() >= world.local_size
    device = torch.device("cuda", world.local_rank) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    begun = time.monotonic()
    engine = TorchEngine(Machine(), "off", device)
    if not gpu:
        torch.set_num_threads(own_cores(engine))
    host = known.host() or socket.gethostname()
    hosts = engine.gather(host)
    mine = computing(device)
    if read is not None:
        try:
            mine[READ.what] = reading(read, engine.rank)
        except OSError as problem:
            mine[READ.what] = 0.0
            print(f"{host}, rank {engine.rank}: {problem}", file=sys.stderr, flush=True)
    leaders = [hosts.index(h) for h in dict.fromkeys(hosts)]
    if (rate := sending(engine, device, leaders)) is not None:
        mine[PAIRS.what] = rate
    found = engine.gather(mine)
    if engine.rank == 0:
        slow = slow_ones(hosts, found)
        for one in slow:
            print(f"slow: {one}", file=sys.stderr, flush=True)
        facts = {
            "ranks": engine.size,
            "nodes": list(dict.fromkeys(hosts)),
            "device": device.type,
            "seconds": round(time.monotonic() - begun, 1),
            "median": {what: median(f[what] for f in found if what in f) for what in MEASURES if what in found[0]},
            "slow": [one._asdict() for one in slow],
            "slow_nodes": list(dict.fromkeys(one.host for one in slow)),
        }
        check_ranks.say(facts)
    engine.barrier()
    engine.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--read", type=Path, metavar="PATH", help="a file, or a folder of them: what a run will read")
    one_rank(parser.parse_args().read)

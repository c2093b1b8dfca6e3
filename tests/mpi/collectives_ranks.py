"""Run under mpirun on 17 ranks: every reference allreduce on its first 1 to 17 ranks, against MPI's own.

Prints one JSON object: {"cases": n, "faults": [...]}. A fault names algorithm, ranks, elements and what was wrong.
"""

import json

import numpy as np
from mpi4py import MPI

from hpc_lbsgd.bench.allreduce import collectives
from hpc_lbsgd.theory import collectives as formulas

NODE_SIZES = (1, 4, 8)
LENGTHS = (0, 5, 840, 84_000)  # 84,000 int64 are above the 256 KB switch; 1 to 8 ranks divide both


def cases(size):
    """(algorithm, ranks of a node) that run on so many ranks."""
    yield from ((a, 1) for a in ("ring", "binary-blocks", "torus"))
    if size & (size - 1) == 0:
        yield "halving-doubling", 1
    yield from (("hierarchical", g) for g in NODE_SIZES)


def expected(algorithm, size, n, node_size):
    if algorithm == "hierarchical":
        return formulas.hierarchical(size, 8 * n, node_size, small=8 * n < 256 * 1024)
    return formulas.FORMULAS[algorithm](size, 8 * n)


def check(comm, algorithm, node_size, n):
    """What is wrong on any rank of `comm`, as a list of sentences on its first."""
    rank, size, wrong = comm.rank, comm.size, []
    where = f"{algorithm} (node {node_size}), {size} ranks, {n} elements"
    mine = np.random.default_rng(rank).integers(-(2**40), 2**40, n)
    own, mpis = mine.copy(), np.empty_like(mine)
    steps = collectives.program(algorithm, rank, size, n, 8, node_size)
    sent = collectives.allreduce(comm, own, steps)
    comm.Allreduce(mine, mpis)
    if not np.array_equal(own, mpis):
        wrong.append(f"{where}: rank {rank} differs from MPI's sum")
    totals = np.array([*sent])
    comm.Allreduce(MPI.IN_PLACE, totals)
    traffic = expected(algorithm, size, n, node_size)
    exact_bytes = algorithm != "hierarchical" or n % 840 == 0
    if rank == 0 and (totals[0] != traffic.messages or (exact_bytes and totals[1] != traffic.sent_bytes)):
        wrong.append(f"{where}: sent {totals.tolist()}, formula {traffic}")
    real = np.random.default_rng(rank).normal(size=n)
    own, mpis = real.copy(), np.empty_like(real)
    collectives.allreduce(comm, own, steps)
    comm.Allreduce(real, mpis)
    if not np.allclose(own, mpis, rtol=1e-12, atol=1e-12):
        wrong.append(f"{where}: rank {rank} differs from MPI's float sum")
    return wrong


world = MPI.COMM_WORLD
done, faults = 0, []
for size in range(1, world.size + 1):
    comm = world.Split(0 if world.rank < size else MPI.UNDEFINED)
    if comm == MPI.COMM_NULL:
        continue
    for algorithm, node_size in cases(size):
        for n in LENGTHS:
            faults += check(comm, algorithm, node_size, n)
            done += 1
    comm.Free()
found = world.gather(faults)
if world.rank == 0:
    print(json.dumps({"cases": done, "faults": sum(found, [])}))

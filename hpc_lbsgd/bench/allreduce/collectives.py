"""Reference allreduces over mpi4py: `theory/allreduce.py`'s programs on real ranks, with every send counted.

They teach and check the cost models; for speed take MPI's own or NCCL's.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hpc_lbsgd.theory.allreduce import ALGORITHMS, Program, hierarchical

TAG = 1


class Sent(NamedTuple):
    messages: int
    sent_bytes: int


def program(algorithm: str, rank: int, size: int, elements: int, itemsize: int, node_size: int = 1) -> Program:
    """This rank's program; `hierarchical` takes the ranks of a node, the others none."""
    if algorithm == "hierarchical":
        return hierarchical(rank, size, elements, node_size, itemsize)
    return ALGORITHMS[algorithm](rank, size, elements)


def allreduce(comm, data: np.ndarray, steps: Program) -> Sent:
    """Replace `data` (1-D, contiguous) by its sum over the ranks of `comm`; returns what this rank sent. Collective."""
    messages = sent_bytes = 0
    for step in steps:
        arriving = [np.empty(m.stop - m.start, data.dtype) if m.add else data[m.start : m.stop] for m in step.receives]
        requests = [comm.Irecv(a, m.peer, TAG) for a, m in zip(arriving, step.receives, strict=True)]
        for m in step.sends:
            part = data[m.start : m.stop]
            requests.append(comm.Isend(part, m.peer, TAG))
            messages += 1
            sent_bytes += part.nbytes
        for request in requests:
            request.Wait()
        for a, m in zip(arriving, step.receives, strict=True):
            if m.add:
                data[m.start : m.stop] += a
    return Sent(messages, sent_bytes)

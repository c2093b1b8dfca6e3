"""`doctor --mpi`: two real ranks a node sum a vector; says whether the sum is right, how fast it was, and clock skew.

python -m hpc_lbsgd.cluster.mpi_check      one rank of it: under mpirun, srun, or started by `check_ranks.measure`
"""

from __future__ import annotations

import socket
import time

from hpc_lbsgd.cluster import check_ranks

RANKS_PER_NODE = 2
REPEATS = 5


def one_rank() -> None:
    """Collective over all ranks of the job."""
    import torch

    from hpc_lbsgd.parallel import engine as engines
    from hpc_lbsgd.parallel import world as worlds
    from hpc_lbsgd.recipe import Machine

    world = worlds.from_environment()
    gpu = torch.cuda.is_available() and torch.cuda.device_count() >= world.local_size
    device = torch.device("cuda", world.local_rank) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    engine = engines.create(Machine(), "off", device)
    vector = torch.empty(2**24 if gpu else 2**22, device=device)
    times, skews, right = [], [], True
    for i in range(REPEATS + 1):
        vector.fill_(engine.rank + 1.0)
        engine.barrier()
        clocks = engine.gather(time.time())
        before = time.perf_counter()
        engine.wait(engine.start_sum(vector, f"check.{i}"))
        if gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - before)
        skews.append(max(clocks) - min(clocks))
        right = right and bool((vector == engine.size * (engine.size + 1) / 2).all())
    nodes = sorted(set(engine.gather(socket.gethostname())))
    cores = worlds.shares(engine.gather(worlds.place()))
    size, seconds, sent = engine.size, sorted(times[1:])[REPEATS // 2], vector.numel() * vector.element_size()
    if engine.rank == 0:
        facts = {
            "ranks": size,
            "nodes": nodes,
            "device": device.type,
            "right": right,
            "cores": round(float(min(cores)), 2),
            "bytes": sent,
            "seconds": seconds,
            # the bytes that a ring moves over each link
            "busbw_bytes_per_s": 2 * (size - 1) / size * sent / seconds,
            # after a barrier clocks are read almost at once; the smallest difference has the least waiting in it
            "clock_skew_s": min(skews),
        }
    engine.barrier()
    if engine.rank == 0:
        check_ranks.say(facts)
    engine.close()


if __name__ == "__main__":
    one_rank()

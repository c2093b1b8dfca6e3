"""`doctor --mpi`: two real ranks a node sum a vector; says whether the sum is right, how fast it was, and clock skew.

python -m hpc_lbsgd.cluster.mpi_check      one rank of it: under mpirun, srun, or started by `measure`
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time

from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.parallel.launchers import Layout, check_hosts, choose, exported, find_mpirun, slots_of
from hpc_lbsgd.parallel.refusals import refusal
from hpc_lbsgd.progress import running

RANKS_PER_NODE = 2
TIMEOUT_S = 120
REPEATS = 5
MARK = "mpi-check: "


def hosts_of_job() -> list[str]:
    """Nodes of the Slurm job that this runs in; none outside a job."""
    nodes = os.environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        return []
    result = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, timeout=30)
    return result.stdout.split()


def measure(hosts: str | None = None) -> dict:
    """Start the ranks with this environment's mpirun; returns rank 0's facts, or {"problem": what went wrong}.

    hosts: "a,b"; default: the nodes of the Slurm job, or this machine.
    """
    names = [slots_of(h)[0] for h in hosts.split(",")] if hosts else hosts_of_job()
    slots = ",".join(f"{name}:{RANKS_PER_NODE}" for name in names) or None
    layout = Layout(RANKS_PER_NODE * max(1, len(names)), slots, oversubscribe=not slots)
    try:
        if slots:
            check_hosts(slots, layout.ranks)
        mpirun = find_mpirun()
        launcher = choose(mpirun)
    except RequestError as problem:
        return {"problem": str(problem)}
    program = [sys.executable, "-m", "hpc_lbsgd.cluster.mpi_check"]
    return run([*launcher.line(mpirun, layout, exported(layout)), *program], layout)


def run(line: list[str], layout: Layout) -> dict:
    """Rank 0's facts, or a problem. The launcher need not end in time once the facts are there."""
    running(line)
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=errors, text=True)
        killer = threading.Timer(TIMEOUT_S, process.kill)
        killer.start()
        found, said = None, ""
        for text in process.stdout:
            said += text
            if text.startswith(MARK):
                found = json.loads(text.removeprefix(MARK))
                break
        if found:
            process.terminate()  # it has nothing left to do, and Open MPI 5 may miss that
        code = process.wait()
        late = not killer.is_alive()
        killer.cancel()
        if found:
            return found
        if late:
            return {"problem": f"{layout.ranks} ranks did not end within {TIMEOUT_S} s: they cannot reach each other"}
        errors.seek(0)
        said += errors.read()
        last = (said.strip() or "nothing").splitlines()[-1]
        return {"problem": refusal(said, layout) or f"mpirun ended with {code}, saying last: {last}"}


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
    cores = engine.gather(worlds.cores())
    size, seconds, sent = engine.size, sorted(times[1:])[REPEATS // 2], vector.numel() * vector.element_size()
    if engine.rank == 0:
        facts = {
            "ranks": size,
            "nodes": nodes,
            "device": device.type,
            "right": right,
            "cores": min(cores),
            "bytes": sent,
            "seconds": seconds,
            # the bytes that a ring moves over each link
            "busbw_bytes_per_s": 2 * (size - 1) / size * sent / seconds,
            # after a barrier clocks are read almost at once; the smallest difference has the least waiting in it
            "clock_skew_s": min(skews),
        }
    engine.barrier()
    if engine.rank == 0:
        print(MARK + json.dumps(facts), flush=True)
    engine.close()


if __name__ == "__main__":
    one_rank()

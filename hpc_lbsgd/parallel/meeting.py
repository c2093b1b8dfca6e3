"""Where the ranks of torch.distributed meet: a key-value store on rank 0. torchrun and Slurm tell by variables where it
is, and MPI is not needed; under mpirun, MPI tells.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from datetime import timedelta

from hpc_lbsgd.errors import RequestError, RunError
from hpc_lbsgd.parallel import world as worlds
from hpc_lbsgd.parallel.openmpi import spare_one_sided

MEET_S = 600.0  # from the first rank's coming to the last one's: imports from a slow file system take minutes
LOOPBACK = "127.0.0.1"
PORTS = range(15_000, 32_000)  # below those that Linux gives to outgoing connections


def told(world: worlds.World, env: Mapping[str, str] = os.environ) -> tuple[str, int] | None:
    """Host and port of rank 0's store; None where only MPI can tell.

    MASTER_ADDR and MASTER_PORT are torchrun's, or the user's own, under any launcher; torchrun's are left over where
    another launcher has started the ranks inside of it. Raises RequestError for a port that is none.
    """
    launcher, host, port = worlds.launcher(env), env.get("MASTER_ADDR"), env.get("MASTER_PORT")
    if host and port and (launcher == "torchrun" or not has_agent(env)):
        if not (port.strip().isdecimal() and 0 < int(port) < 2**16):
            raise RequestError(f"MASTER_PORT = {port}: not a port; allowed: 1 to 65535, or unset it")
        return host, int(port)
    if launcher == "srun":
        host = LOOPBACK if world.local_size == world.size else first_host(env["SLURM_STEP_NODELIST"])
        # one job's steps may run side by side; a node's jobs too
        return host, PORTS[(17 * int(env["SLURM_JOB_ID"]) + int(env.get("SLURM_STEP_ID", 0))) % len(PORTS)]
    return None


def start_of(env: Mapping[str, str] = os.environ) -> str:
    """What tells two starts apart that ask at one port, as two of Slurm's jobs on a shared node may, where the port
    follows from their numbers; "": it is one start's own. A user's MASTER_ADDR may serve ranks of several numbers."""
    slurms = worlds.launcher(env) == "srun" and not (env.get("MASTER_ADDR") and env.get("MASTER_PORT"))
    return f"{env['SLURM_JOB_ID']}.{env.get('SLURM_STEP_ID', 0)}" if slurms else ""


def has_agent(env: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun has a store already, and MASTER_ADDR and MASTER_PORT are its own."""
    return env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def first_host(nodes: str) -> str:
    """The first of Slurm's "rack[1-2]n[003-010,12],login": "rack1n003", where Slurm puts rank 0."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes).group()
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)


def meet(world: worlds.World):
    """(the store, has MPI been started). Collective; returns when all ranks are here.

    Raises RunError naming the ranks that did not come within MEET_S seconds.
    """
    import torch.distributed as dist

    if world.size == 1:
        return dist.HashStore(), False
    place = told(world)
    host, port = place or told_by_mpi(world)
    limit = timedelta(seconds=MEET_S)
    try:
        if worlds.launcher() == "torchrun" and has_agent():
            store, *_ = next(dist.rendezvous("env://", world.rank, world.size, timeout=limit))
        else:
            store = dist.TCPStore(host, port, world.size, world.rank == 0, limit, wait_for_workers=False)
    except dist.DistError as problem:
        raise RunError(
            f"rank {world.rank} on {socket.gethostname()}: ranks cannot meet at {host}:{port} ("
            f"{str(problem).splitlines()[0]}); MASTER_ADDR and MASTER_PORT, set for all ranks, name another place"
        ) from None
    store = dist.PrefixStore(start_of(), store)
    keys = [f"here/{rank}" for rank in range(world.size)]
    store.set(keys[world.rank], "")
    try:
        store.wait(keys, timedelta(seconds=MEET_S))
    except dist.DistError:
        try:
            missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        except dist.DistError:
            raise RunError("rank 0, at which ranks meet, has ended, and says why") from None
        raise RunError(f"ranks {missing[:20]} of {world.size} did not come within {MEET_S:g} s") from None
    return store, place is None


def told_by_mpi(world: worlds.World) -> tuple[str, int]:
    """A free port of rank 0's host."""
    spare_one_sided()
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as problem:
        raise RequestError(
            f"mpi4py does not load ({problem}), from which ranks under mpirun learn where to meet: start them with "
            "torchrun or srun, or set MASTER_ADDR and MASTER_PORT"
        ) from None
    comm = MPI.COMM_WORLD
    if comm.size != world.size or comm.rank != world.rank:
        raise RunError(
            f"the launcher's environment says rank {world.rank} of {world.size}, MPI says {comm.rank} of {comm.size}: "
            "start the job with one launcher only"
        )
    host = LOOPBACK if world.local_size == world.size else socket.gethostname()
    return comm.bcast((host, free_port()) if comm.rank == 0 else None)


def free_port() -> int:
    """A port of this host that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]

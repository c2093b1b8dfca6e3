"""Where this process is among all ranks, and what carries their sums."""

from __future__ import annotations

import atexit
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Literal, NamedTuple

import torch

from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.parallel import world as worlds
from hpc_lbsgd.parallel.engine import Engine
from hpc_lbsgd.sections import Machine

Determinism = Literal["any-ranks", "same-ranks", "off"]
NOT_MPI = (None, "torchrun")  # launchers whose ranks Horovod would not find


@dataclass(frozen=True)
class World:
    """This rank of `size`; `local_rank` of the `local_size` on its node; its device."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    determinism: Determinism
    engine: Engine = field(repr=False)
    settled: Mapping[str, object] = field(repr=False, default_factory=dict)  # by init, and to stay; none where off


class Settings(NamedTuple):
    """What a process settles before its engine starts, as recipes have it."""

    determinism: Determinism
    machine: Machine
    precision: str = "float32"


_world: World | None = None
_process = 0  # that began it: a fork of it is no rank


def init(engine: Literal["horovod", "torch"] | None = None, determinism: Determinism = "any-ranks") -> World:
    """Meet the other ranks; once for a process, and before it computes: threads and kernels are settled here.

    engine: None takes horovod where it is installed and MPI's launcher started the ranks, else torch. determinism:
    any-ranks (the same bits on any number of ranks; a CPU rank computes in one thread), same-ranks, or off.
    Collective. A second call returns the same world, and raises RequestError where it asks for another.
    """
    global _world, _process
    if determinism not in ("any-ranks", "same-ranks", "off"):
        raise RequestError(f"lb.init(determinism={determinism!r}): any-ranks, same-ranks or off")
    if engine not in (None, "horovod", "torch"):
        raise RequestError(f"lb.init(engine={engine!r}): horovod, torch or None")
    if _world is not None:
        if determinism != _world.determinism or engine not in (None, _world.engine.name):
            raise RequestError(
                f"lb.init: this process has begun with engine = {_world.engine.name} and determinism = "
                f"{_world.determinism}, which hold until it ends"
            )
        return _world
    from hpc_lbsgd.train import alike, job  # what a rank of the trainer settles, too

    asked = Settings(determinism, Machine(engine=engine or _engine_here()))
    device, started = job.meet(asked)
    job.refuse_shared(started.gather(job.place_of(device)))
    alike.refuse_other(started.gather(alike.software()), started.gather(socket.gethostname()))
    settled = settings(device) if determinism != "off" else {}
    _world = World(
        started.rank, started.size, started.local_rank, started.local_size, device, determinism, started, settled
    )  # fmt: skip
    _process = os.getpid()
    atexit.register(close)
    return _world


def close() -> None:
    """Leave the other ranks: at the process's end by itself. A notebook may `init` again afterwards with the torch
    engine; Horovod starts once."""
    global _world
    if _world is not None:
        world, _world = _world, None
        if os.getpid() == _process:
            world.engine.close()


def settings(device: torch.device) -> dict[str, object]:
    """What decides the bits of a kernel, and a script can change, by the name of what changes it."""
    found: dict[str, object] = {"torch.use_deterministic_algorithms": torch.are_deterministic_algorithms_enabled()}
    if device.type == "cpu":
        return found | {"torch.set_num_threads": torch.get_num_threads()}
    return found | {"torch.backends.cudnn.benchmark": torch.backends.cudnn.benchmark}


def current(asker: str) -> World:
    """The world of this process. Raises RequestError where `init` was not called."""
    if _world is None:
        raise RequestError(f"{asker}: call lb.init() first, before anything is computed")
    return _world


def begun() -> World | None:
    """The world of this process, if it has one."""
    return _world


def _engine_here() -> Literal["horovod", "torch"]:
    return "horovod" if worlds.launcher() not in NOT_MPI and find_spec("horovod") else "torch"

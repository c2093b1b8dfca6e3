"""Ranks on nodes of their own (a network namespace each) whose network goes."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import runs
import spaces
from core import Injection, Row, hold, one_line
from hurt import fail_at

END_S = 30.0


def one(rng: random.Random, folder: Path) -> Iterator[Injection]:
    """The shared file system stays; where it goes too, nothing of that rank is heard any more, as of a stopped one."""
    path, run, mark, go = runs.recipe(folder), folder / "run", folder / "mark", folder / "go"
    ranks, step = rng.randint(2, 4), rng.randrange(1, 20)
    victim, how = rng.randrange(ranks), rng.choice(["cut", "unplugged"])
    phase = rng.choice(["data", "forward", "sum", "evaluation"])
    moment = f"rank {victim} of {ranks} {how} in {phase} of step {step}"
    network = spaces.Network()
    plugged = folder / "plugged"

    def before(rank: int) -> None:
        spaces.own_network()
        (folder / f"here-{rank}").touch()
        while not plugged.exists():
            time.sleep(0.01)
        os.environ.update(MASTER_ADDR=network.address(0), LOCAL_RANK="0", LOCAL_WORLD_SIZE="1",
                          GLOO_SOCKET_IFNAME="eth0")  # fmt: skip

    try:
        env = fail_at(victim, step, "wait", phase, mark=str(mark), go=str(go))
        job = runs.train(ranks, path, run, env=env, before=before)
        here = [folder / f"here-{rank}" for rank in range(ranks)]
        hold(job.wait_for(lambda: all(p.exists() for p in here), 30), f"{moment}: no namespaces", job.said)
        network.plug_in(job.pids)
        plugged.touch()
        hold(job.wait_for(mark.exists, 60), f"{moment}: it did not happen", job.said)
        (network.cut if how == "cut" else network.unplug)(victim)
        begun = time.monotonic()
        go.touch()
        gone = job.wait(END_S)
        took = time.monotonic() - begun
        job.end()
    finally:
        network.end()
    status = runs.status(run)
    hold(gone, f"{moment}: ranks were there after {END_S} s: {job.codes}", job.said)
    hold(all(job.codes.values()), f"{moment}: {job.codes}", job.said)
    hold(status.get("status") == "failed" and status.get("crashed"), f"{moment}: {status}", job.said)
    hold("network" in status["error"], f"{moment}: the network is not named: {status}", job.said)
    lost = runs.last_step(run) - runs.checkpointed(run)
    yield Injection(moment, "watchdog", round(took, 2), lost, one_line(job.said))
    digest = runs.finished(rng.randint(1, 3), path, run, "--resume")
    hold(digest == runs.reference(), f"{moment}: other weights after the resume")
    runs.whole(run)


ROWS = [
    Row("cut-off", "a rank's network is cut, its node lives on (a namespace a rank)",
        "told, and ended within 30 s; resumed to the same weights", 20, one, ranks=True, cost_s=11,
        why_not=lambda: spaces.why_not("nsenter", "ip"))
]  # fmt: skip

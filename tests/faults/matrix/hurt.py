"""The injector: a model and a data set such as a user's, which fail where they are told to.

A rank imports this module as it imports any user's. What is to go wrong is in the environment variable FAULT: JSON with
`rank`, `step`, `phase` (start, data, forward, sum, checkpoint, evaluation) and `kind`, as `fail_at` writes it.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
import time

import numpy as np
import torch
from torch import nn

from hpc_lbsgd.parallel import world
from hpc_lbsgd.train import checkpoint
from hpc_lbsgd.train.watchdog import Watchdog

SAMPLES, FEATURES, CLASSES = 90, 16, 4
KINDS = ("kill", "segfault", "exit", "exception", "deadlock")
PHASES = ("start", "data", "forward", "sum", "checkpoint", "evaluation")


def fail_at(rank: int, step: int, kind: str, phase: str = "forward", **more) -> dict[str, str]:
    """What to add to a rank's environment."""
    return {"FAULT": json.dumps({"rank": rank, "step": step, "kind": kind, "phase": phase, **more})}


class Fault:
    def __init__(self):
        self.told = json.loads(os.environ.get("FAULT") or "null")
        mine = self.told and self.told["rank"] == world.from_environment().rank
        self.plan = self.told if mine else None
        self.phase, self.step, self.done = "start", -1, False

    def at(self, phase: str) -> bool:
        """Whether it is to happen here and now; it happens once."""
        plan = self.plan
        if self.done or not plan or plan["phase"] != phase or self.step < plan["step"]:
            return False
        self.done = plan["kind"] not in ("slow",)
        return True

    def happen(self, phase: str) -> None:
        if self.plan and self.plan["kind"] in ACTS and self.at(phase):
            mark(self.plan.get("mark"))
            ACTS[self.plan["kind"]](self.plan)


def mark(path: str | None) -> None:
    """Leave the moment in a file for who injects."""
    if path:
        with open(path, "w") as f:
            f.write(str(time.time()))


def _raise(plan: dict) -> None:
    raise ValueError("injected exception")


def _hang(plan: dict) -> None:
    threading.Event().wait()


def _wait(plan: dict) -> None:
    """Until who injects has done what it does, and made the file `go`."""
    end = time.monotonic() + plan.get("seconds", 60)
    while not os.path.exists(plan["go"]) and time.monotonic() < end:
        time.sleep(0.005)


ACTS = {
    "kill": lambda plan: os.kill(os.getpid(), signal.SIGKILL),
    "segfault": lambda plan: ctypes.string_at(0),
    "exit": lambda plan: os._exit(plan.get("code", 0)),
    "exception": _raise,
    "deadlock": _hang,
    "wait": _wait,
    "stop": lambda plan: os.kill(os.getpid(), signal.SIGSTOP),
    "slow": lambda plan: time.sleep(plan["seconds"]),
}

fault = Fault()


def install() -> None:
    """Follow where the trainer is; once a process (a forked rank calls it, an imported module does so by itself)."""
    global fault
    fault = Fault()
    enter, write = getattr(Watchdog.enter, "inner", Watchdog.enter), checkpoint.write_atomically
    write = getattr(write, "inner", write)

    def entering(self, phase, step):
        fault.phase, fault.step = phase, step
        enter(self, phase, step)
        if phase == "sum":
            fault.happen("sum")
        if phase == "checkpoint" and self.rank:
            fault.happen("checkpoint")

    def writing(path, content):
        if path.name == "state.json":
            fault.happen("checkpoint")
        write(path, content)

    entering.inner, writing.inner = enter, write
    Watchdog.enter, checkpoint.write_atomically = entering, writing


class Data:
    classes = tuple("abcd")

    def __init__(self, part: str):
        self.part = part
        self.salt = (fault.told or {}).get("data") if fault.plan else None
        self.fingerprint = f"{part} {self.salt or ''}"
        rng = np.random.default_rng(len(part) + (self.salt or 0))
        self.labels = np.arange(SAMPLES if part == "train" else 30) % CLASSES
        self.inputs = rng.normal(0, 1, (len(self.labels), FEATURES)).astype(np.float32)
        self.inputs[:, :CLASSES] += np.eye(CLASSES, dtype=np.float32)[self.labels]

    def __len__(self) -> int:
        return len(self.labels)

    def sample(self, index, rng):
        if self.part == "train" and fault.phase != "start":
            fault.happen("data")
        if self.part == "eval" and fault.phase == "evaluation":
            fault.happen("evaluation")
        noise = rng.normal(0, 0.1, FEATURES).astype(np.float32)
        return self.inputs[index] + noise * (self.part == "train"), int(self.labels[index])


class Net(nn.Sequential):
    def forward(self, x):
        if self.training and fault.phase == "compute":
            fault.happen("forward")
            if fault.done and "drag" in fault.plan:  # so that it still runs when it has heard of something
                time.sleep(fault.plan["drag"])
            if fault.plan and fault.plan["kind"] in BAD and fault.at("forward"):
                return super().forward(x) * BAD[fault.plan["kind"]]
        return super().forward(x)


BAD = {"nan": float("nan"), "inf": float("inf"), "overflow": 1e35}


def dataset(part: str) -> Data:
    return Data(part)


def model(channels: int, classes: int) -> nn.Module:
    fault.happen("start")
    torch_code = (fault.told or {}).get("width", 0) if fault.plan else 0
    hidden = nn.Linear(FEATURES, 8)
    net = Net(hidden, nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, classes))
    if torch_code:  # other code on this rank: the same shapes, another function
        net[2] = nn.LeakyReLU(0.3)
    return net


def image_model(channels: int, classes: int) -> nn.Module:
    """The same, on pictures of 4 x 4."""
    return Net(nn.Flatten(), *model(channels, classes))


def slow_model(channels: int, classes: int) -> nn.Module:
    """In a job of Slurm it takes its time until a file `fast` is there; so do saves, where `slow-saves` is."""
    plain = checkpoint.write_atomically

    def writing(path, content):
        if path.name == "state.json" and os.path.exists("slow-saves"):
            time.sleep(1.0)
        plain(path, content)

    checkpoint.write_atomically = writing
    return Net(Pause(), *model(channels, classes))


class Pause(nn.Module):
    def forward(self, x):
        if "SLURM_JOB_ID" in os.environ and not os.path.exists("fast"):
            time.sleep(0.05)
        return x


if "FAULT" in os.environ and "torch" in sys.modules:
    install()
assert torch.float32

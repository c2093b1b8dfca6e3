"""The validated description of a run.

A recipe is a YAML file. Its *result part* decides the weights (model, data, batch, optim, schedule, train, seed,
precision, wire, determinism) and is fingerprinted; `machine` and `checkpoint` say how this machine does the work.
Here: the sections together (keys and meanings: sections.py), what follows from them, and how a recipe is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from hpc_lbsgd import own_schedule, reading, yaml12
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.reading import flatten, override, shipped
from hpc_lbsgd.sections import Batch, Checkpoint, Data, Machine, Model, Optim, ScheduleSection, Section, Train
from hpc_lbsgd.theory import schedule as schedules
from hpc_lbsgd.theory.scaling import scaled_lr

__all__ = [  # what callers know from here
    "BIT_KEYS", "STAGE_DIR", "Batch", "Checkpoint", "Data", "Decision", "Machine", "Model", "Optim", "Recipe",
    "ScheduleSection", "Train", "expanded", "flatten", "load_resolved", "override", "read", "shipped", "validate",
]  # fmt: skip

# Machine keys that change bits: part of the result where bits are promised
BIT_KEYS: dict[str, tuple[str, ...]] = {
    "off": (),
    "same-ranks": (
        "channels_last",
        "compile",
        "threads",
        "workers_per_pass",
        "engine",
        "bucket_mb",
        "first_bucket_mb",
    ),
    "any-ranks": ("channels_last", "compile"),
}

ONE_WORKER = (
    "batch.workers = 1 with schedule.kind = adaptive-batch, which follows the noise scale: one worker cannot measure "
    "it; allowed: at least 2"
)


class Decision(NamedTuple):
    """An adaptive-batch run's choice at the end of an epoch: what holds from `epoch` on."""

    epoch: int
    workers: int
    lr: float


class Recipe(Section):
    seed: Annotated[int, Field(ge=0)] = 0
    precision: Literal["float64", "float32", "tf32", "bf16"] = "float32"
    """tf32: float32 whose products GPUs take with 10 bits after the point (on CPUs it is float32); bf16: autocast;
    weights, gradients and updates stay float32"""
    determinism: Literal["off", "same-ranks", "any-ranks"] = "off"
    """same-ranks: the same bits again on as many ranks; any-ranks: on any number"""
    wire: Literal["fp32", "fp16", "bf16"] = "fp32"
    """gradients on the wire; fp32 means as computed (float64 runs send float64); bf16: machine.engine torch only"""
    wire_scale_bits: Annotated[int, Field(ge=0, le=24)] = 10
    """wire fp16: gradients times 2**bits before the cast"""
    fixed_point: Literal["int64", "int32"] = "int64"
    """any-ranks: what sums are taken in; int32: gradients at float32's bytes, each tensor in a unit that follows from
    its last sum; a step that int32 cannot hold is computed again in int64"""
    fixed_point_bits: Annotated[int, Field(ge=8, le=52)] = 40
    """any-ranks: int64's unit is 2**-bits"""
    model: Model = Model()
    data: Data = Data()
    batch: Batch = Batch()
    optim: Optim = Optim()
    schedule: ScheduleSection = ScheduleSection()
    train: Train = Train()
    checkpoint: Checkpoint = Checkpoint()
    machine: Machine = Machine()

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        if self.determinism == "any-ranks":
            if self.machine.workers_per_pass != 1:
                raise ValueError(
                    f"machine.workers_per_pass = {self.machine.workers_per_pass}: determinism any-ranks runs "
                    "one worker a pass; allowed: 1"
                )
            if self.machine.threads not in (None, 1):
                raise ValueError(
                    f"machine.threads = {self.machine.threads}: determinism any-ranks computes with one "
                    "thread a CPU rank; allowed: 1"
                )
            if self.wire != "fp32":
                raise ValueError(f"wire = {self.wire}: determinism any-ranks sends int64; allowed: fp32")
        if self.fixed_point == "int32":
            for key, allowed in (("determinism", "any-ranks"), ("precision", "float32, tf32, bf16")):
                if getattr(self, key) not in allowed.split(", "):
                    raise ValueError(
                        f"fixed_point = int32 with {key} = {getattr(self, key)}; allowed with {key} = {allowed}"
                    )
        if self.determinism == "same-ranks" and self.machine.reduction == "fusion":
            raise ValueError(
                "machine.reduction = fusion: run-time fusion changes the summation order from run to run; "
                "determinism same-ranks allows: buckets"
            )
        if self.determinism == "same-ranks" and self.machine.allreduce:
            raise ValueError(
                f"machine.allreduce = {self.machine.allreduce}: its summation order follows the placement of ranks on "
                "nodes; determinism same-ranks allows: none"
            )
        if self.machine.engine == "ddp":
            for key, value, allowed in (
                ("determinism", self.determinism, "off"),
                ("wire", self.wire, "fp32"),
            ):
                if value != allowed:
                    raise ValueError(f"{key} = {value}: machine.engine = ddp allows: {allowed}")
        if self.machine.engine == "horovod" and self.wire == "bf16":
            raise ValueError("wire = bf16: Horovod has no such type; allowed: fp32, fp16, or machine.engine = torch")
        if self.machine.engine != "horovod":
            engine, reduction, allreduce = self.machine.engine, self.machine.reduction, self.machine.allreduce
            if reduction != "buckets":
                raise ValueError(f"machine.reduction = {reduction}: machine.engine = {engine} allows: buckets")
            if allreduce:
                raise ValueError(f"machine.allreduce = {allreduce}: machine.engine = {engine} allows: none")
        if self.precision == "float64" and self.wire != "fp32":
            raise ValueError(f"wire = {self.wire} with precision = float64; allowed: fp32")
        if self.schedule.milestones and self.schedule.milestones[-1] >= self.train.epochs:
            raise ValueError(
                f"schedule.milestones = {self.schedule.milestones}: the last must come before "
                f"train.epochs = {self.train.epochs}"
            )
        if self.schedule.warmup != "none" and self.schedule.warmup_epochs > self.train.epochs:
            raise ValueError(
                f"schedule.warmup_epochs = {self.schedule.warmup_epochs} is more than "
                f"train.epochs = {self.train.epochs}"
            )
        if self.optim.form == "v" and self.schedule.warmup_start_lr == 0 and self.schedule.warmup != "none":
            raise ValueError(
                "schedule.warmup_start_lr = 0 with optim.form = v: momentum correction divides by the last "
                "learning rate; allowed: above 0"
            )
        if self.schedule.kind == "adaptive-batch" and not self.train.noise_scale_steps:
            raise ValueError(
                "train.noise_scale_steps = 0 with schedule.kind = adaptive-batch, which follows the "
                "measured noise scale; allowed: at least 1"
            )
        if self.schedule.kind == "adaptive-batch" and self.optim.decay_in == "loss":
            raise ValueError(
                "optim.decay_in = loss with schedule.kind = adaptive-batch: no noise scale is measured then, for "
                "weight decay would be part of it; allowed: gradient"
            )
        if self.schedule.kind == "adaptive-batch" and self.batch.workers == 1:
            raise ValueError(ONE_WORKER)
        if self.machine.loader_processes and not self.data.dataset:
            raise ValueError(
                f"machine.loader_processes = {self.machine.loader_processes}: only a set of your own (data.dataset) is "
                "made in processes; images are decoded in threads (machine.loader_threads)"
            )
        if self.train.label_smoothing and self.train.loss not in ("cross-entropy", "pixel-cross-entropy"):
            raise ValueError(
                f"train.label_smoothing = {self.train.label_smoothing}: only with train.loss = cross-entropy"
            )
        return self

    # ------------------------------------------------------------ derived

    def with_workers(self, ranks: int) -> Recipe:
        """The recipe with `workers: per_rank` settled for this number of ranks."""
        if self.batch.workers != "per_rank":
            return self
        return self.model_copy(update={"batch": self.batch.model_copy(update={"workers": ranks})})

    def with_threads(self, cores: int) -> Recipe:
        """The recipe with the compute threads of a CPU rank settled, where their number is part of the result."""
        if self.machine.threads or "threads" not in BIT_KEYS[self.determinism]:
            return self
        return self.model_copy(update={"machine": self.machine.model_copy(update={"threads": cores})})

    def with_compile(self, parts: str) -> Recipe:
        """The recipe with the parts that are compiled settled."""
        return self.model_copy(update={"machine": self.machine.model_copy(update={"compile": parts})})

    def result_part(self) -> dict[str, Any]:
        """What decides the weights. Paths and sizes of data are left out: the data is fingerprinted apart. Where bits
        are promised, keys of the machine that change bits belong to it."""
        part = self.model_dump(
            mode="json",
            exclude={
                "machine": True,
                "checkpoint": True,
                "train": {"max_steps", "preflight", "eval_epochs", "metrics", "callbacks", "loggers"},
                "data": {"train", "eval", "samples", "classes"},
                "model": {"init_from"},
            },
        )
        part["batch"]["bn_group"] = self.batch.group
        if not self.optim.options:  # runs from before there were any have none in theirs
            del part["optim"]["options"]
        part["machine"] = {key: getattr(self.machine, key) for key in BIT_KEYS[self.determinism]}
        return part

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.result_part(), sort_keys=True).encode()).hexdigest()

    def peak_lr(self) -> float:
        return scaled_lr(self.optim.base_lr, self.optim.base_batch, self.batch.kn, self.schedule.scaling)

    def build_schedule(self, samples: int, decisions: Sequence[Decision] = ()) -> schedules.Schedule:
        """The run as a function of the step, on N samples; `batch.workers` must be settled.

        decisions: what an adaptive-batch run has decided so far.
        """
        if self.schedule.kind == "adaptive-batch" and self.batch.k == 1:  # per_rank, on one rank
            raise RequestError(ONE_WORKER)
        n, kn = self.batch.samples_per_worker, self.batch.kn
        stages = [*self._stages(), *(schedules.Stage(d.epoch, d.workers, d.lr, self.optim.momentum) for d in decisions)]
        largest = max(s.workers for s in stages) * n
        if self.batch.last_batch == "drop" and largest > samples:
            raise RequestError(
                f"batch.workers = {self.batch.workers} times batch.samples_per_worker = {n} is {kn}"
                + (f", and grows to {largest}" if largest > kn else "")
                + f": more than the {samples} samples of an epoch; with batch.last_batch = drop no step is left"
            )
        s = self.schedule
        start = self.optim.base_lr if s.warmup_start_lr is None else s.warmup_start_lr
        warmup = schedules.Warmup(0.0 if s.warmup == "none" else s.warmup_epochs, start, s.warmup)
        # weight decay inside the loss would be measured as gradient
        measure_every = self.train.noise_scale_steps if self.optim.decay_in == "gradient" else 0
        return schedules.Schedule(
            samples, n, stages, self.train.epochs, self.batch.last_batch, warmup, self.train.max_steps, measure_every
        )

    def _stages(self) -> list[schedules.Stage]:
        s, lr = self.schedule, self.peak_lr()
        first = (self.batch.k, lr, self.optim.momentum)
        if ":" in s.kind:
            return own_schedule.stages(s.kind, *first, self.train.epochs)
        if s.kind == "decaying-lr":
            return schedules.step_decay(*first, s.milestones, s.factor)
        if s.kind in ("hybrid", "increasing-batch"):
            grow_at = 1 if s.kind == "hybrid" else len(s.milestones)
            try:
                return schedules.growing_batch(*first, s.milestones, s.factor, self.max_workers(), grow_at)
            except ValueError:
                raise RequestError(
                    f"schedule.factor = {s.factor:g}: the batch grows by whole workers of batch.samples_per_worker = "
                    f"{self.batch.samples_per_worker}, and {self.batch.workers} workers times it are not whole"
                ) from None
        if s.kind == "slow-start":
            return schedules.slow_start(*first, self.train.epochs)
        shape = {"adaptive-batch": "constant"}.get(s.kind, s.kind)
        return [schedules.Stage(0, *first, shape, s.power)]

    def max_workers(self) -> int | None:
        """schedule.max_batch in workers; refuses what is no whole number of them, or below the start."""
        n, largest = self.batch.samples_per_worker, self.schedule.max_batch
        if largest is None:
            return None
        if largest % n:
            raise RequestError(f"schedule.max_batch = {largest} must be a multiple of batch.samples_per_worker = {n}")
        if largest < self.batch.kn:
            raise RequestError(
                f"schedule.max_batch = {largest} is below the batch that the run starts with, {self.batch.kn}"
            )
        return largest // n

    def to_yaml(self) -> str:
        return yaml12.dump(self.model_dump(mode="json"))


# ---------------------------------------------------------------- folders of a machine

STAGE_DIR = "HPC_LBSGD_STAGE_DIR"  # environment: a site's folder, where the recipe has no machine.stage_dir


def expanded(path: str, key: str) -> str:
    """`path` with this host's environment variables in place; refuses one that is not set."""
    found = os.path.expandvars(path)
    if "$" in found:
        raise RequestError(f"{key} = {path}: a variable in it is not set on {socket.gethostname()}")
    return found


# ---------------------------------------------------------------- reading


def read(name: str, settings: Sequence[str] = ()) -> Recipe:
    """A recipe by shipped name or path, with `key.path=value` settings on top.

    Raises RequestError with one message that names key and value.
    """
    return validate(reading.recipe_content(name, settings), f"recipe {name}")


def validate(content: dict[str, Any], where: str = "recipe") -> Recipe:
    return reading.validated(Recipe, content, where)


def schema() -> dict[str, Any]:
    """A JSON schema of recipes, for editors that complete and check keys (draft 2020-12)."""
    found = Recipe.model_json_schema()
    # in place of a section, the file of a machine that includes
    machine = found["properties"]["machine"]
    found["properties"]["machine"] = {"anyOf": [machine, {"type": "string"}]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found, "title": "hpc_lbsgd recipe"}


def load_resolved(path: Path) -> Recipe:
    """The recipe of a run folder, as it was settled at the first start."""
    return validate(yaml12.mapping_of(path, str(path)), str(path))

"""The validated description of a run.

A recipe is a YAML file. Its *result part* decides the weights (model, data, batch, optim, schedule, train, seed,
precision, wire, determinism) and is fingerprinted; `machine` and `checkpoint` say how this machine does the work.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from hpc_lbsgd import reading, yaml12
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.reading import override, shipped  # noqa: F401 - callers know them from here
from hpc_lbsgd.theory import schedule as schedules
from hpc_lbsgd.theory.scaling import scaled_lr

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]
T = TypeVar("T")
Pair = Annotated[tuple[T, T], Field(strict=False)]  # YAML and JSON have lists; the items stay strict


def _whole(value):
    """For a choice among numbers, where pydantic takes True and 1.0 for the 1."""
    if type(value) is not int:
        raise PydanticCustomError("int_type", "Input should be a valid integer")
    return value


class Section(BaseModel):
    # strict: a boolean is no number, a number no boolean, text neither; an int will do where a float is wanted
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Model(Section):
    name: (
        Literal["resnet50", "resnet101", "inception-resnet-v2", "resnet20", "resnet8", "wrn-16-4"]
        | Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]
    ) = "resnet50"
    """resnet50, resnet101, inception-resnet-v2 (ImageNet shapes); resnet20, resnet8, wrn-16-4 (28-32 pixels); or
    package.module:function, which is called with (channels, classes) and returns a torch module"""
    widths: list[Count] | None = None
    """channels of resnet8's three blocks (default 16, 32, 64)"""
    stem: Literal["plain", "pool", "stride"] = "plain"
    """pool, stride: resnet8 and resnet20 halve the picture after the first convolution, or by it; cheaper"""
    zero_gamma: bool = True
    """start each residual block's last BatchNorm at gamma = 0 (Goyal et al. 2017, section 5.1)"""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """dropout before the classifier"""


class Data(Section):
    dataset: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")] | None = None
    """package.module:function in place of train and eval; called with "train" and "eval" (see docs/your-model.md)"""
    train: str | None = None
    """a folder of class folders, or a manifest"""
    eval: str | None = None
    """the same for evaluation"""
    samples: Count | None = None
    """N; what `plan` uses without the data, checked against the data when it is there"""
    classes: Annotated[int, Field(ge=2)] | None = None
    """number of classes; checked against the data when it is there"""
    loader: Literal["dali", "torchvision"] = "dali"
    """who decodes (on GPUs: and resizes)"""
    channels: Annotated[Literal[1, 3], BeforeValidator(_whole)] = 3
    """1: grey, 3: RGB"""
    image_size: Count = 224
    """height and width of what the model sees, in pixels"""
    augment: Literal["none", "flip", "pad-crop", "resized-crop"] = "resized-crop"
    crop_padding: Annotated[int, Field(ge=0)] = 4
    """pad-crop: black pixels on each side"""
    crop_area: Pair[Share] = (0.08, 1.0)
    """resized-crop: smallest and largest share of the image's area"""
    crop_aspect: Pair[Positive] = (0.75, 4 / 3)
    """resized-crop: smallest and largest width / height"""
    eval_resize: Annotated[int, Field(ge=0)] = 256
    """evaluation: shorter side, before the centre crop; 0: images have their size already"""
    on_bad_image: Literal["error", "skip"] = "error"
    """training images that cannot be read or decoded: end the run, or put another in its place and count it"""
    mean: list[float] = [123.675, 116.28, 103.53]
    """subtracted, by channel, on the scale of 0 to 255"""
    std: list[Positive] = [58.395, 57.12, 57.375]
    """divided by, by channel, on the scale of 0 to 255"""

    @model_validator(mode="after")
    def _consistent(self):
        for key in ("mean", "std"):
            if len(getattr(self, key)) != self.channels:
                raise ValueError(f"data.{key} has {len(getattr(self, key))} values for data.channels = {self.channels}")
        for key in ("crop_area", "crop_aspect"):
            low, high = getattr(self, key)
            if low > high:
                raise ValueError(f"data.{key} = [{low}, {high}]: the first must not be above the second")
        return self


class Batch(Section):
    samples_per_worker: Count = 32
    """n"""
    workers: Count | Literal["per_rank"] = "per_rank"
    """k; per_rank: one worker a rank, settled at the first start and kept"""
    bn_group: Count | None = None
    """samples that BatchNorm sees together; divides n (default n)"""
    last_batch: Literal["drop", "partial"] = "partial"
    """the tail of an epoch: dropped (the papers' step counts), or a step of fewer samples, their sum over kn"""

    @model_validator(mode="after")
    def _group_divides(self):
        if self.bn_group and self.samples_per_worker % self.bn_group:
            raise ValueError(
                f"batch.bn_group = {self.bn_group} must divide batch.samples_per_worker = {self.samples_per_worker}"
            )
        return self

    @property
    def group(self) -> int:
        return self.bn_group or self.samples_per_worker


class Optim(Section):
    name: Literal["sgd", "adam", "lars"] = "sgd"
    """sgd: (Nesterov) momentum; lars: layer-wise rates, for batches above 8k"""
    base_lr: Positive = 0.1
    """learning rate that is right at base_batch"""
    base_batch: Count = 256
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """adam: beta1"""
    nesterov: bool = True
    form: Literal["u", "v"] = "u"
    """sgd: u keeps the learning rate out of the momentum buffer (torch's); v absorbs it (Goyal et al. 2017, eq. 10)"""
    momentum_correction: bool = True
    """form v: scale the buffer when the learning rate changes (Goyal et al. 2017, Remark 2)"""
    weight_decay: NotNegative = 1e-4
    """not on BatchNorm's parameters and biases"""
    decay_in: Literal["gradient", "loss"] = "gradient"
    """where weight decay enters: added to the reduced gradient, or as a term of the loss"""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """adam: decay of the second moment"""
    epsilon: Positive = 1e-8
    """adam: added to the root of the second moment"""
    trust: Positive = 0.001
    """lars: trust coefficient"""


GROWING = ("hybrid", "increasing-batch", "adaptive-batch")  # schedules whose batch changes
ONE_WORKER = (
    "batch.workers = 1 with schedule.kind = adaptive-batch, which follows the noise scale: one worker cannot measure "
    "it; allowed: at least 2"
)


class ScheduleSection(Section):
    kind: Literal[
        "constant", "decaying-lr", "hybrid", "increasing-batch", "adaptive-batch", "cosine", "polynomial", "slow-start"
    ] = "decaying-lr"
    """decaying-lr, hybrid, increasing-batch: Smith et al. 2018, at milestones; adaptive-batch: McCandlish et al. 2018;
    slow-start: Akiba et al. 2017"""
    scaling: Literal["linear", "sqrt", "none"] = "linear"
    """how the learning rate follows the global batch that the run starts with"""
    warmup: Literal["gradual", "constant", "none"] = "gradual"
    """gradual: a constant increment a step; constant: warmup_start_lr, then a jump"""
    warmup_epochs: NotNegative = 5.0
    warmup_start_lr: NotNegative | None = None
    """where warm-up starts (default base_lr: the learning rate of base_batch, not of one worker)"""
    milestones: list[Count] = []
    """epochs at which the noise scale is divided by factor"""
    factor: Annotated[float, Field(gt=1)] = 10.0
    """by the learning rate, by the batch, or by both where max_batch caps it"""
    max_batch: Count | None = None
    """hybrid, increasing-batch, adaptive-batch: the largest global batch"""
    power: Positive = 2.0
    """polynomial: (1 - progress)^power"""
    noise_factor: Positive = 1.0
    """adaptive-batch: r in B = sqrt(r * B_simple) (McCandlish et al. 2018, eq. D.6)"""
    lr_on_batch_change: Literal["keep", "linear", "noise"] = "noise"
    """adaptive-batch: what the learning rate does when the batch changes (noise: McCandlish et al. 2018, eq. 2.6)"""

    @model_validator(mode="after")
    def _consistent(self):
        if any(a >= b for a, b in zip(self.milestones, self.milestones[1:], strict=False)):
            raise ValueError(f"schedule.milestones = {self.milestones} must rise")
        if self.max_batch and self.kind not in GROWING:
            raise ValueError(
                f"schedule.max_batch = {self.max_batch} has no meaning for schedule.kind = {self.kind}; "
                f"allowed with: {', '.join(GROWING)}"
            )
        return self


class Train(Section):
    epochs: Count = 90
    max_steps: Count | None = None
    """a cap for this start; not part of the fingerprint"""
    eval_epochs: Count = 1
    """evaluate every so many epochs, and at the end"""
    loss: Annotated[str, Field(pattern=r"^(cross-entropy|[\w.]+:\w+)$")] = "cross-entropy"
    """or package.module:function, which takes (outputs, labels) and returns a loss a sample, shape (B,)"""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    preflight: bool = True
    """before the first step, check model, data and ranks against what the run promises (see docs/runs.md); not part of
    the fingerprint"""
    on_bad_step: Literal["stop", "skip"] = "stop"
    """a step that is not finite, or beyond fixed point's range: end the run, or go on without it"""
    bad_steps_limit: Count = 10
    """skip: the run ends when more than so many in a row are bad"""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """evaluate and keep an exponential moving average of the weights, and of BatchNorm's statistics, too"""
    noise_scale_steps: Annotated[int, Field(ge=0)] = 100
    """measure the noise scale at the first full step of two workers or more at or after each multiple of this; 0:
    never"""
    noise_scale_window: Annotated[int, Field(ge=2)] = 20
    """measurements that are averaged"""


class Checkpoint(Section):
    steps: Count | None = None
    """every so many steps"""
    minutes: Positive | None = None
    """every so many minutes, by rank 0's clock"""
    keep: Count = 2
    """how many to keep, beside the best"""


class Machine(Section):
    engine: Literal["horovod", "ddp"] = "horovod"
    """ddp: torch.distributed's DistributedDataParallel, on Gloo or NCCL; determinism off only"""
    reduction: Literal["buckets", "fusion"] = "buckets"
    """buckets: few flat buffers; fusion: a tensor each, Horovod fuses them at run time"""
    bucket_mb: Positive = 25.0
    """size of a bucket"""
    first_bucket_mb: Positive = 1.0
    """size of the first one, so that communication starts early"""
    fusion_threshold_mb: NotNegative = 128.0
    """fusion: HOROVOD_FUSION_THRESHOLD"""
    cycle_time_ms: Positive | None = None
    """HOROVOD_CYCLE_TIME (default 0.1 on CPU ranks, 1 on GPUs)"""
    yield_when_idle: bool | None = None
    """Open MPI: a rank that waits leaves its core to others (default true on CPU ranks, false on GPUs)"""
    allreduce: Literal["hierarchical", "torus"] | None = None
    """Horovod with NCCL on several nodes: sums on a node first (default: over all ranks at once)"""
    workers_per_pass: Count = 1
    """workers in one forward-backward; constant for the run"""
    threads: Count | None = None
    """compute threads of a CPU rank (default: cores of the node / ranks on it)"""
    loader_threads: Count | None = None
    """decoding threads of a rank (default: cores / ranks, at most 8)"""
    prefetch: Count = 2
    """batches decoded ahead"""
    compile: Literal["none", "stages"] = "none"
    """torch.compile, a residual stage at a time"""
    channels_last: bool = True
    """memory format of images and weights"""
    stage_dir: str | None = None
    """node-local folder, such as $SLURM_TMPDIR; each node copies a packed set there once and reads it from there
    (default: the site's, for sets that are packed)"""
    eval_batch: Count = 250
    """images in one evaluation pass"""
    cross_check_steps: Annotated[int, Field(ge=0)] = 100
    """any-ranks: every so many steps ranks compare digests of their weights, and one worker is computed by a second
    rank, on another node; 0: never"""
    stall_timeout_s: Positive = 600.0
    """no step for so long: the stalest ranks are named and the job ends"""


# Machine keys that change bits: part of the result where bits are promised
BIT_KEYS = {
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


class Decision(NamedTuple):
    """An adaptive-batch run's choice at the end of an epoch: what holds from `epoch` on."""

    epoch: int
    workers: int
    lr: float


class Recipe(Section):
    seed: Annotated[int, Field(ge=0)] = 0
    precision: Literal["float64", "float32", "bf16"] = "float32"
    """bf16: autocast; weights, gradients and updates stay float32"""
    determinism: Literal["off", "same-ranks", "any-ranks"] = "off"
    """same-ranks: the same bits again on as many ranks; any-ranks: on any number"""
    wire: Literal["fp32", "fp16"] = "fp32"
    """gradients on the wire; fp32 means as computed (float64 runs send float64)"""
    wire_scale_bits: Annotated[int, Field(ge=0, le=24)] = 10
    """wire fp16: gradients times 2**bits before the cast"""
    fixed_point_bits: Annotated[int, Field(ge=8, le=52)] = 40
    """any-ranks: sums are taken in int64 units of 2**-bits"""
    model: Model = Model()
    data: Data = Data()
    batch: Batch = Batch()
    optim: Optim = Optim()
    schedule: ScheduleSection = ScheduleSection()
    train: Train = Train()
    checkpoint: Checkpoint = Checkpoint()
    machine: Machine = Machine()

    @model_validator(mode="after")
    def _fits_together(self):
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
                raise ValueError("wire = fp16: determinism any-ranks sends int64; allowed: fp32")
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
                ("machine.reduction", self.machine.reduction, "buckets"),
            ):
                if value != allowed:
                    raise ValueError(f"{key} = {value}: machine.engine = ddp allows: {allowed}")
        if self.precision == "float64" and self.wire == "fp16":
            raise ValueError("wire = fp16 with precision = float64; allowed: fp32")
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
        if self.train.loss != "cross-entropy" and self.train.label_smoothing:
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

    def result_part(self) -> dict:
        """What decides the weights. Paths and sizes of data are left out: the data is fingerprinted apart. Where bits
        are promised, keys of the machine that change bits belong to it."""
        part = self.model_dump(
            mode="json",
            exclude={
                "machine": True,
                "checkpoint": True,
                "train": {"max_steps", "preflight"},
                "data": {"train", "eval", "samples", "classes"},
            },
        )
        part["batch"]["bn_group"] = self.batch.group
        part["machine"] = {key: getattr(self.machine, key) for key in BIT_KEYS[self.determinism]}
        return part

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.result_part(), sort_keys=True).encode()).hexdigest()

    def peak_lr(self) -> float:
        kn = self.batch.workers * self.batch.samples_per_worker
        return scaled_lr(self.optim.base_lr, self.optim.base_batch, kn, self.schedule.scaling)

    def build_schedule(self, samples: int, decisions: Sequence[Decision] = ()) -> schedules.Schedule:
        """The run as a function of the step, on N samples; `batch.workers` must be settled.

        decisions: what an adaptive-batch run has decided so far.
        """
        if self.schedule.kind == "adaptive-batch" and self.batch.workers == 1:  # per_rank, on one rank
            raise RequestError(ONE_WORKER)
        n, kn = self.batch.samples_per_worker, self.batch.workers * self.batch.samples_per_worker
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
        first = (self.batch.workers, lr, self.optim.momentum)
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
        if largest < self.batch.workers * n:
            raise RequestError(
                f"schedule.max_batch = {largest} is below the batch that the run starts with, {self.batch.workers * n}"
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


def validate(content: dict, where: str = "recipe") -> Recipe:
    return reading.validated(Recipe, content, where)


def load_resolved(path: Path) -> Recipe:
    """The recipe of a run folder, as it was settled at the first start."""
    return validate(yaml12.mapping_of(path, str(path)), str(path))

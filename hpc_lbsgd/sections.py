"""The sections of a recipe: every key with its type, its default, what it means, and what a section refuses by itself.
docs/recipe.md is made from this file."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.urls import checked, is_url

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Own = Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]  # package.module:function, from the folder of the start
T = TypeVar("T")
Pair = Annotated[tuple[T, T], Field(strict=False)]  # YAML and JSON have lists; the items stay strict


def _whole(value: object) -> int:
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
    name: Literal["resnet50", "resnet101", "inception-resnet-v2", "resnet20", "resnet8", "wrn-16-4"] | Own = "resnet50"
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
    init_from: str | None = None
    """weights to start from: a run folder, or a state dict (.pt, .pth, .safetensors); a classifier of another number of
    classes starts anew. Compared by content at a resume (preflight) while it is there, not part of the fingerprint"""


class Data(Section):
    dataset: Own | None = None
    """package.module:function in place of train and eval; called with "train" and "eval" (see docs/your-model.md)"""
    train: str | None = None
    """a folder of class folders, or a manifest; or the address of a packed set, https:// or s3:// (see docs/data.md)"""
    eval: str | None = None
    """the same for evaluation"""
    samples: Count | None = None
    """N; what `plan` uses without the data, checked against the data when it is there"""
    inputs: Annotated[list[str], Field(min_length=1)] = ["image"]
    """fields of the set that the model's forward gets: one as its tensor, several by name (see docs/data.md)"""
    targets: Annotated[list[str], Field(min_length=1)] = ["class"]
    """fields of the set that the loss gets: one as its tensor, several as a dict of them by name (see docs/data.md)"""
    encode: dict[str, Own] = {}
    """{field: package.module:function}: what makes numbers of a text or of bytes, called with one sample's"""
    classes: Count | None = None
    """number of classes; checked against the data when it is there. With other targets: how many outputs the model is
    asked for (default: a number for each)"""
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
    orientation: Literal["ignore", "apply"] = "ignore"
    """EXIF's orientation: pixels as they are stored, or turned upright, before windows are chosen"""
    on_bad_image: Literal["error", "skip"] = "error"
    """training images that cannot be read or decoded: end the run, or put another in its place and count it"""
    mean: list[float] = [123.675, 116.28, 103.53]
    """subtracted, by channel, on the scale of 0 to 255"""
    std: list[Positive] = [58.395, 57.12, 57.375]
    """divided by, by channel, on the scale of 0 to 255"""

    @model_validator(mode="after")
    def _consistent(self) -> Data:
        for key in ("train", "eval"):
            if is_url(path := getattr(self, key)):
                checked(path, f"data.{key}")
        for key in ("mean", "std"):
            if len(getattr(self, key)) != self.channels:
                raise ValueError(f"data.{key} has {len(getattr(self, key))} values for data.channels = {self.channels}")
        for key in ("inputs", "targets"):
            if len(set(getattr(self, key))) < len(getattr(self, key)):
                raise ValueError(f"data.{key} = [{', '.join(getattr(self, key))}]: one is there twice")
        if self.classes == 1 and self.targets == ["class"] and not self.dataset:
            raise ValueError("data.classes = 1: there is nothing to tell apart; allowed: at least 2")
        for key, known in (("targets", ["class"]), ("inputs", ["image"])):
            if self.dataset and (asked := getattr(self, key)) != known:
                gets = "the loss" if key == "targets" else "the model"
                raise ValueError(
                    f"data.{key} = [{', '.join(asked)}] with data.dataset = {self.dataset}: a set of your own says by "
                    f"itself what {gets} gets"
                )
        if self.dataset and self.encode:
            raise ValueError(f"data.encode with data.dataset = {self.dataset}: a set of your own gives numbers")
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
    def _group_divides(self) -> Batch:
        if self.bn_group and self.samples_per_worker % self.bn_group:
            raise ValueError(
                f"batch.bn_group = {self.bn_group} must divide batch.samples_per_worker = {self.samples_per_worker}"
            )
        return self

    @property
    def group(self) -> int:
        return self.bn_group or self.samples_per_worker

    @property
    def k(self) -> int:
        """workers, once settled. Raises RequestError for per_rank: no number of ranks is known yet."""
        if isinstance(self.workers, int):
            return self.workers
        raise RequestError(f"batch.workers = {self.workers}: not settled yet; needed here: a number")

    @property
    def kn(self) -> int:
        """The global batch, once the workers are settled."""
        return self.k * self.samples_per_worker


OPTIMIZERS = ("sgd", "adam", "lars")  # ours, over flat buckets; others step parameters


def _lower(name: object) -> object:
    return name.lower() if isinstance(name, str) and ":" not in name else name


class Optim(Section):
    name: Annotated[Literal["sgd", "adam", "lars"] | Annotated[str, Field(pattern=r"^\w+$")] | Own,
                    BeforeValidator(_lower)] = "sgd"  # fmt: skip
    """sgd: (Nesterov) momentum; lars: layer-wise rates, for batches above 8k; the name of any other class in
    torch.optim (adamw, rmsprop, ...), in any case; or package.module:function, called with groups of parameters, `lr`
    and what of weight_decay, momentum, betas and options it takes, which returns a torch optimizer (see
    docs/own-code.md)"""
    base_lr: Positive = 0.1
    """learning rate that is right at base_batch"""
    base_batch: Count = 256
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """adam: beta1; of other optimizers `momentum`, or the first of `betas`, where they have it"""
    nesterov: bool = True
    """sgd"""
    form: Literal["u", "v"] = "u"
    """sgd: u keeps the learning rate out of the momentum buffer (torch's); v absorbs it (Goyal et al. 2017, eq. 10)"""
    momentum_correction: bool = True
    """form v: scale the buffer when the learning rate changes (Goyal et al. 2017, Remark 2)"""
    weight_decay: NotNegative = 1e-4
    """not on BatchNorm's parameters and biases"""
    decay_in: Literal["gradient", "loss"] = "gradient"
    """where weight decay enters: added to the reduced gradient (adamw and others that are not ours: as they decay), or
    as a term of the loss"""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """adam: decay of the second moment"""
    epsilon: Positive = 1e-8
    """adam: added to the root of the second moment"""
    trust: Positive = 0.001
    """lars: trust coefficient"""
    options: dict[str, Any] = {}
    """keyword arguments of an optimizer that is not sgd, adam or lars, beside lr, weight_decay and momentum"""

    @model_validator(mode="after")
    def _options_belong_to_others(self) -> Optim:
        if self.options and self.name in OPTIMIZERS:
            raise ValueError(
                f"optim.options = {self.options}: {self.name} has keys of its own; allowed with the other optimizers "
                "(torch.optim:SGD is torch's)"
            )
        for key in ("nesterov", "form", "momentum_correction", "beta2", "epsilon", "trust"):
            value = getattr(self, key)
            if self.name not in OPTIMIZERS and value != type(self).model_fields[key].default:
                raise ValueError(f"optim.{key} = {value}: of sgd, adam or lars; {self.name} has optim.options")
        return self


GROWING = ("hybrid", "increasing-batch", "adaptive-batch")  # schedules whose batch changes


class ScheduleSection(Section):
    kind: (
        Literal[
            "constant", "decaying-lr", "hybrid", "increasing-batch", "adaptive-batch", "cosine", "polynomial",
            "slow-start",
        ]
        | Own
    ) = "decaying-lr"  # fmt: skip
    """decaying-lr, hybrid, increasing-batch: Smith et al. 2018, at milestones; adaptive-batch: McCandlish et al. 2018;
    slow-start: Akiba et al. 2017; or package.module:function, which is called with (workers, lr, momentum, epochs) and
    returns stages (see docs/own-code.md)"""
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
    def _consistent(self) -> ScheduleSection:
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
    loss: Literal["cross-entropy", "pixel-cross-entropy", "mse", "binary-cross-entropy"] | Own = "cross-entropy"
    """pixel-cross-entropy: of a mask, mean over its pixels; mse, binary-cross-entropy (of outputs before the sigmoid):
    of numbers, mean over a sample's; or package.module:function, which takes (outputs, labels) and returns a loss a
    sample, shape (B,)"""
    metrics: list[Own] = []
    """package.module:function, each takes (outputs, labels) in evaluations and returns a value a sample, shape (B,), or
    a sum and a count; the mean is in records by the function's name. Not part of the fingerprint"""
    callbacks: list[Own] = []
    """package.module:Class or :function, told of start, steps, evaluations, checkpoints and end, on rank 0 (see
    docs/own-code.md); not part of the fingerprint"""
    loggers: list[Literal["wandb", "mlflow"]] = []
    """who keeps records beside TensorBoard, through packages of their own; not part of the fingerprint"""
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
    minutes: Positive | Literal["auto"] | None = None
    """every so many minutes, by rank 0's clock; auto: by Young and Daly, from the measured stall and mtbf_hours, the
    first one after the first step"""
    mtbf_hours: Positive = 5000.0
    """auto: mean time between failures of one node, in hours; a job on n nodes fails n times as often"""
    keep: Count = 2
    """how many to keep, beside the best"""


class Machine(Section):
    engine: Literal["horovod", "torch", "ddp"] = "horovod"
    """torch: the same buckets through torch.distributed, on Gloo or NCCL, without Horovod and MPI; ddp: its
    DistributedDataParallel; determinism off only"""
    reduction: Literal["buckets", "fusion"] = "buckets"
    """buckets: few flat buffers; fusion: a tensor each, Horovod fuses them at run time"""
    bucket_mb: Positive = 25.0
    """size of a bucket"""
    first_bucket_mb: Positive = 1.0
    """size of the first one, so that communication starts early"""
    fusion_threshold_mb: NotNegative = 128.0
    """fusion: HOROVOD_FUSION_THRESHOLD"""
    cycle_time_ms: Positive | None = None
    """HOROVOD_CYCLE_TIME (default 0.1 on CPU ranks, 0.25 on GPUs)"""
    yield_when_idle: bool | None = None
    """Open MPI: a rank that waits leaves its core to others (default true on CPU ranks, false on GPUs)"""
    allreduce: Literal["hierarchical", "torus"] | None = None
    """Horovod with NCCL on several nodes: sums on a node first (default: over all ranks at once)"""
    workers_per_pass: Count = 1
    """workers in one forward-backward; constant for the run"""
    threads: Count | None = None
    """compute threads of a CPU rank (default: the cores that it has to itself)"""
    loader_threads: Count | None = None
    """decoding threads of a rank (default: the cores that it has to itself, at most 8)"""
    loader_processes: Count | None = None
    """data.dataset: make samples in so many processes of a rank, for Python that holds its lock (default: threads)"""
    prefetch: Count = 2
    """batches decoded ahead"""
    prefetch_mb: Positive = 2048.0
    """CPU ranks: about how much memory samples may take while they are read and decoded ahead; batches of large images
    are made in parts, one image at least"""
    compile: Literal["auto", "none", "norms", "stages"] = "auto"
    """torch.compile, for passes of whole workers; stages: a residual stage at a time; norms: only BatchNorms that get
    several groups; auto: stages on GPUs (norms, where a model has none), none on CPUs"""
    channels_last: bool = True
    """memory format of images and weights"""
    stage_dir: str | None = None
    """node-local folder, such as $SLURM_TMPDIR; each node copies a packed set there once and reads it from there
    (default: the site's, for sets that are packed). Of a remote set it keeps samples there that it has read"""
    stage_gb: Positive | None = None
    """of a run's packed sets at most so much on a node: of remote ones, and of all where they are larger together, the
    samples that are needed soonest (default: of remote ones nine tenths of what is free, others whole)"""
    eval_batch: Count = 250
    """images in one evaluation pass"""
    cross_check_steps: Annotated[int, Field(ge=0)] = 100
    """any-ranks: every so many steps ranks compare digests of their weights, and one worker is computed by a second
    rank, on another node; 0: never"""
    stall_timeout_s: Positive = 600.0
    """no step for so long: the stalest ranks are named and the job ends"""

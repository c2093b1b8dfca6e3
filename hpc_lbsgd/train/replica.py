"""One rank's copy of everything a step changes: weights, running statistics, optimizer state."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from hpc_lbsgd.data.targets import Inputs, Target, each
from hpc_lbsgd.errors import RunError
from hpc_lbsgd.parallel.buckets import Buckets
from hpc_lbsgd.parallel.engine import Engine
from hpc_lbsgd.parallel.layout import plan_layouts
from hpc_lbsgd.theory.schedule import Point
from hpc_lbsgd.train import compiling, crosscheck, models, optim
from hpc_lbsgd.train.statistics import RunningStatistics
from hpc_lbsgd.train.workers import PassContext, make_virtual

DTYPES = dict.fromkeys(("float32", "tf32", "bf16"), torch.float32) | {"float64": torch.float64}  # of weights
WIRES = {"fp16": torch.float16, "bf16": torch.bfloat16}  # of gradients under way, where not as computed


class Distributed:
    """Any model, its parameters laid into buckets and its layers shown virtual workers, on this rank's device.

    dtype: of weights and statistics. bits: of fixed point (any-ranks), else None. bucket_bytes, first_bucket_bytes:
    sizes of buckets; 0: one a tensor. wire, int32: as for `Buckets`. calls: how often BatchNorm layers are called in a
    forward, where more than once (`preflight.before`). loss_decay: weight decay inside the loss. autocast: passes
    compute in bfloat16.
    """

    def __init__(
        self,
        model: nn.Module,
        engine: Engine,
        device: torch.device,
        *,
        dtype: torch.dtype,
        seed: int,
        bn_group: int,
        bits: int | None,
        bucket_bytes: float,
        first_bucket_bytes: float,
        wire: tuple[torch.dtype, float] | None = None,
        int32: bool = False,
        calls: Mapping[str, int] | None = None,
        loss_decay: float = 0.0,
        autocast: bool = False,
        memory_format: torch.memory_format = torch.preserve_format,
    ):
        self.engine, self.device, self.dtype, self.autocast = engine, device, dtype, autocast
        self.loss_decay, self.bucket_mb = loss_decay, bucket_bytes / 2**20
        self.model: nn.Module = model.to(device, memory_format=memory_format)
        self.context = PassContext(seed, bn_group)
        self.running = RunningStatistics(make_virtual(self.model, self.context), calls or {}, dtype, device)
        layouts = plan_layouts(
            [(n, p) for n, p in self.model.named_parameters() if p.requires_grad],
            optim.no_decay_names(self.model),
            self.running.size,
            bucket_bytes,
            min(bucket_bytes, first_bucket_bytes),
            wire is not None or int32,
        )
        self.buckets = Buckets(layouts, engine, device, dtype, bits=bits, wire=wire, int32=int32)
        self.training_model = self.model  # what a pass calls

    def begin_pass(self, step: int, workers: list[int], counts: list[int]) -> None:
        """Before a forward: its workers, and how many samples each has."""
        self.context.begin(step, workers, counts)
        self.running.begin_pass(len(self.context.groups))

    def forward(self, inputs: Inputs, groups_in_step: int) -> torch.Tensor:
        """The model's outputs; what its BatchNorm layers measured goes to the first bucket. groups_in_step: BatchNorm
        groups of the whole step, over all ranks."""
        outputs = self.outputs(inputs)
        self.end_forward(groups_in_step)
        return outputs

    def end_forward(self, groups_in_step: int) -> None:
        """After a forward and before its backward: what BatchNorm layers measured goes to the first bucket."""
        self.running.end_forward(self.buckets.statistics, len(self.context.groups), groups_in_step)

    def outputs(self, inputs: Inputs) -> torch.Tensor:
        """The model's outputs."""
        model = self.training_model if self.model.training else self.model
        return outputs(model, inputs, self.dtype, self.device, self.autocast)

    def share(self, loss: torch.Tensor, samples: int, point: Point) -> torch.Tensor:
        """What a pass differentiates: its sum of losses over kn, so that the sum over ranks is the step's gradient
        (Goyal et al. 2017, Remark 3). In a tail too: absent samples count as zeros, and each sample of an epoch moves
        the weights alike."""
        loss = loss / point.global_batch
        if self.loss_decay:
            # each pass carries its samples' share, so that all ranks' losses sum to one decay term
            term = torch.stack([w.square().sum() for w in self.decayed()]).sum()
            loss = loss + 0.5 * self.loss_decay * term * (samples / point.count)
        return loss

    def end_pass(self) -> None:
        """After backward."""
        self.context.end()

    def passing(self, sums: bool) -> AbstractContextManager:
        """Around a forward-backward. sums: it is the one in which the engine's model sums gradients over ranks."""
        if sums or not self.engine.sums_gradients:
            return nullcontext()
        return self.training_model.no_sync()

    def decayed(self) -> Iterator[nn.Parameter]:
        """Parameters that have weight decay."""
        for bucket in self.buckets.buckets:
            yield from (v.parameter for v in bucket.layout.views if v.offset < bucket.layout.decay_end)

    def synchronise(self) -> None:
        """Rank 0's weights and statistics on every rank; then all must have one checksum.

        Collective, once, before the first step: the engine meets the model here.
        """
        self.training_model = self.engine.wrap(self.model, self.bucket_mb)
        self.buckets.broadcast_weights()
        self.engine.broadcast(self.running.flat, "running")
        self.engine.broadcast(self.running.batches, "batches")
        for name, tensor in self.others_now():
            if self.engine.size == 1:
                continue
            # in order, where a frozen convolution lies channels last; as bytes, for engines do not know all types
            whole = tensor.contiguous()
            self.engine.broadcast(whole.view(-1).view(torch.uint8), f"state.{name}")
            tensor.copy_(whole)
        self.others, self.trained = self.digests_of_others(), trained_in(self.model)
        self.check_equal("start")

    def others_now(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What the model holds and no step changes: frozen parameters, the user's buffers."""
        ours = {flat.untyped_storage().data_ptr() for flat in (*self.flats(), self.running.batches)}
        named = (*self.model.named_parameters(), *self.model.named_buffers())
        return ((n, t.detach()) for n, t in named if t.numel() and t.untyped_storage().data_ptr() not in ours)

    def digests_of_others(self) -> dict[str, torch.Tensor]:
        return {name: crosscheck.digest([tensor]) for name, tensor in self.others_now()}

    def check_others(self) -> None:
        """Raise RunError where training changed what it does not account for. Not collective."""
        moved = self.trained.symmetric_difference(trained_in(self.model))
        if moved:
            name = min(moved)
            what = "it still decays, and moves by its momentum" if name in self.trained else "no step moves it"
            raise RunError(
                f"requires_grad of {name} was changed since the start, and {what}: what trains is settled where the "
                "model is made. Weights since the last checkpoint are not the recipe's"
            )
        now = self.digests_of_others()
        changed = [n for n in self.others if n not in now or now[n] != self.others[n]]
        changed += [n for n in now if n not in self.others]
        if changed:
            raise RunError(
                f"{changed[0]} was changed since the start, and no step of the trainer does that: forward must change "
                "BatchNorm's statistics alone, for every rank and pass would change other state by itself, and the "
                "result would depend on their number. Weights since the last checkpoint are not the recipe's"
            )

    def check_equal(self, when: str) -> None:
        """Raise RunError where ranks hold different weights, statistics or buffers. Collective."""
        digests = self.engine.gather(int(self.digest()))
        other = [rank for rank, d in enumerate(digests) if d != digests[0]]
        if other:
            raise RunError(
                f"weights differ between ranks at the {when}: ranks {other[:20]} are not equal to rank 0. A rank "
                "computed or received something else; do not trust results since the last checkpoint",
                everywhere=True,
            )

    def flats(self) -> list[torch.Tensor]:
        """Weights and running statistics as they lie in memory."""
        return [self.running.flat, *(bucket.weights for bucket in self.buckets.buckets)]

    def digest(self) -> torch.Tensor:
        """Of all that the model holds: an int64 scalar."""
        return crosscheck.digest([*self.flats(), self.running.batches, *(tensor for _, tensor in self.others_now())])

    def gradient_bytes(self) -> int:
        return sum(b.layout.size * b.gradients.element_size() for b in self.buckets.buckets)


class Replica(Distributed):
    """The model as `recipe` says, with its optimizer.

    channels_last: the memory format of the weights, and the one that images should have.
    """

    def __init__(
        self,
        recipe,
        classes: int,
        engine: Engine,
        device: torch.device,
        calls: Mapping[str, int] | None = None,
        model: nn.Module | None = None,  # made already
    ):
        dtype, machine = DTYPES[recipe.precision], recipe.machine
        if model is None:
            model = models.build(recipe.model, recipe.data.channels, classes, recipe.seed, dtype)
        self.frozen = models.frozen_in(model)
        models.train(model, self.frozen)  # a model's own `train` may freeze layers
        unfold_expanded(model)
        memory_format = memory_format_of(recipe, model, device)
        self.channels_last = memory_format == torch.channels_last
        scale = 2.0**recipe.wire_scale_bits if recipe.wire == "fp16" else 1.0  # bfloat16 has float32's range
        limit = 0 if machine.reduction == "fusion" else machine.bucket_mb * 2**20
        super().__init__(
            model,
            engine,
            device,
            dtype=dtype,
            seed=recipe.seed,
            bn_group=recipe.batch.group,
            bits=recipe.fixed_point_bits if recipe.determinism == "any-ranks" else None,
            bucket_bytes=limit,
            first_bucket_bytes=machine.first_bucket_mb * 2**20,
            wire=(WIRES[recipe.wire], scale) if recipe.wire in WIRES else None,
            int32=recipe.fixed_point == "int32",
            calls=calls,
            loss_decay=recipe.optim.weight_decay if recipe.optim.decay_in == "loss" else 0.0,
            autocast=recipe.precision == "bf16",
            memory_format=memory_format,
        )
        self.bucket_mb = machine.bucket_mb
        self.optimizer = optim.create(self.buckets, recipe.optim, model)
        decay = recipe.train.ema_decay
        averaged = [*(b.weights for b in self.buckets.buckets), self.running.flat]
        self.average = optim.Average(averaged, decay) if decay else None
        if machine.compile in ("stages", "norms"):
            compiling.compile_parts(self.model, self.context, machine.compile, recipe.batch.samples_per_worker)

    def train(self) -> None:
        """Into training, where it is not."""
        if not self.model.training:  # it visits every module
            models.train(self.model, self.frozen)

    def update(self, point: Point, previous_lr: float, ok: torch.Tensor | None = None) -> None:
        """Take the step: the buckets hold the sums over all workers. ok: as for `Optimizer.step`."""
        self.optimizer.step(point, previous_lr, ok)
        self.running.update(self.buckets.statistics, point.share, ok)
        if self.average:
            self.average.update(ok)

    @property
    def exponents(self) -> dict[str, int]:
        """Of the units of int32 sums, by parameter; empty where there are none."""
        return self.buckets.scales.exponents if self.buckets.scales else {}

    @exponents.setter
    def exponents(self, exponents: dict[str, int]) -> None:
        if self.buckets.scales:
            self.buckets.scales.exponents = exponents

    def synchronise(self) -> None:
        """As `Distributed.synchronise`, and rank 0's optimizer state and averages on every rank."""
        self.optimizer.synchronise(self.engine, self.device)
        for i, flat in enumerate(self.average.flats if self.average else ()):
            self.engine.broadcast(flat, f"average.{i}")
        super().synchronise()

    def averaged(self) -> dict[str, torch.Tensor]:
        """The averages of weights and BatchNorm statistics, as views, by all names of the state dict that they have
        (`train.ema_decay` only)."""
        *weights, running = self.average.flats
        places = {**self.buckets.named(weights), **self.running.named(running)}
        state = self.model.state_dict()
        by_place = {state[name].data_ptr(): view for name, view in places.items()}  # tied parameters have several
        return {name: by_place[t.data_ptr()] for name, t in state.items() if t.numel() and t.data_ptr() in by_place}


def trained_in(model: nn.Module) -> set[str]:
    """Names of the parameters that training moves."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def unfold_expanded(model: nn.Module) -> None:
    """Give what is one value many times (`expand`) memory for each, for nothing can be written into it as it is."""
    for tensor in (*model.parameters(), *model.buffers()):
        if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
            tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)


def outputs(model: nn.Module, inputs: Inputs, dtype: torch.dtype, device: torch.device, autocast: bool):
    """What `model` makes of a batch, in float64 or float32. What is counted (tokens) stays as it is; what is measured
    is taken in the precision of the weights."""
    inputs = each(lambda given: measured(given, dtype), inputs)
    with torch.autocast(device.type, torch.bfloat16) if autocast else nullcontext():
        found = called(model, inputs)
    return unhalved(found)


def called(model: nn.Module, inputs: Inputs):
    """A model's forward, of one input, or of several by name."""
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)


def measured(given: Target, dtype: torch.dtype) -> Target:
    """An input in the precision of the weights, where it is no count. Bytes are pixels in a tensor, and bytes in a
    list."""
    if isinstance(given, list):
        return [t.to(dtype) if t.is_floating_point() else t for t in given]
    return given.to(dtype) if given.is_floating_point() or given.dtype == torch.uint8 else given


def unhalved(found):
    """Outputs in float32 where they were in half of it, whatever holds them: a loss is a sum over many."""
    if isinstance(found, torch.Tensor):
        return found.float() if found.dtype in (torch.bfloat16, torch.float16) else found
    if isinstance(found, dict):
        for key, value in found.items():
            found[key] = unhalved(value)
    elif isinstance(found, list):
        found[:] = map(unhalved, found)
    elif isinstance(found, tuple):
        parts = map(unhalved, found)
        return type(found)(*parts) if hasattr(found, "_fields") else type(found)(parts)
    return found


def memory_format_of(recipe, model: nn.Module, device: torch.device) -> torch.memory_format:
    """Of weights and images."""
    last = recipe.machine.channels_last and all(t.dim() != 5 for t in (*model.parameters(), *model.buffers()))
    last = last and (device.type != "cpu" or channels_last_is_safe(model))
    return torch.channels_last if last else torch.contiguous_format


def channels_last_is_safe(model: nn.Module) -> bool:
    """False where oneDNN's backward of a strided 1x1 convolution writes past its buffer: with fewer channels than
    its block of 16, channels last (uxlfoundation/oneDNN#6035). The heap is corrupted without a message."""
    return not any(
        isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and m.stride != (1, 1) and m.in_channels // m.groups < 16
        for m in model.modules()
    )


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over the state dict by name: parameters and BatchNorm statistics, in their own types."""
    return state_sha256(model.state_dict())


def state_sha256(state: dict[str, torch.Tensor]) -> str:
    """`weights_sha256` of the model that a state dict is of."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()

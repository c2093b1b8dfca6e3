"""A model and an optimizer of the user's, under the trainer's buckets and virtual workers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hpc_lbsgd.api.shuffle import Part, Step
from hpc_lbsgd.api.world import Determinism, World, current
from hpc_lbsgd.errors import RequestError, RunError
from hpc_lbsgd.theory import noise
from hpc_lbsgd.train.own_optim import refuse_closure, refuse_sparse
from hpc_lbsgd.train.replica import Distributed, unfold_expanded
from hpc_lbsgd.train.step import measurement_of
from hpc_lbsgd.train.workers import groups_in_step

FIRST_BUCKET_MB = 1.0  # so that communication starts early
# The control vector, summed once a step beside the gradients; after these a slot a worker for its loss, then one for
# its squared norm, so that they do not depend on the rank count either.
COUNT, BAD_RANKS, BAD_RANK_SUM, WORKERS = range(4)


@dataclass(frozen=True)
class Verdict:
    """What every rank knows after a sum; true where every rank's losses and gradients are finite."""

    finite: bool
    loss: float  # mean over the step's samples, over all ranks
    count: int  # samples of the step
    bad_ranks: int  # ranks whose own losses or gradients were not finite, or beyond fixed point's range
    bad_rank: int | None  # that rank, if it is one
    measurement: noise.Measurement | None  # where the schedule measures the noise scale

    def __bool__(self) -> bool:
        return self.finite


class Run:
    """What `lb.distribute` returns.

    for step in shuffle.steps(loader):
        for part in step.workers:
            with run.part(part):
                run.backward(criterion(run.model(part.inputs), part.labels))  # one loss a sample
        if run.reduce(step):
            optimizer.step()

    model, optimizer   the user's own
    step               the number of the next step: of `reduce`s so far, or as loaded
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        world: World,
        seed: int,
        bn_group: int | None,
        bucket_mb: float,
        norm_calls: Mapping[str, int] | None,
        fixed_point_bits: int,
    ):
        self.model, self.optimizer, self.world, self.step = model, optimizer, world, 0
        self._bn_group = bn_group
        unfold_expanded(model)
        self.replica = Distributed(
            model,
            world.engine,
            world.device,
            dtype=next(p.dtype for p in model.parameters() if p.requires_grad),
            seed=seed,
            bn_group=bn_group or 1,  # else each step's n
            bits=fixed_point_bits if world.determinism == "any-ranks" else None,
            bucket_bytes=bucket_mb * 2**20,
            first_bucket_bytes=FIRST_BUCKET_MB * 2**20,
            calls=norm_calls,
        )
        self._places = {name: (p, place) for name, p, place in self._laid()}
        self._step: Step | None = None  # under way
        self._part: Part | None = None  # of the pass under way
        self._losses_went = self._sound = False
        self._passes = 0
        optimizer.register_step_pre_hook(self._before_update)
        optimizer.register_step_post_hook(self._after_update)
        optimizer.zero_grad = self._zero_grad  # type: ignore[method-assign]
        self.replica.synchronise()

    def _laid(self) -> Iterator[tuple[str, nn.Parameter, torch.Tensor]]:
        for bucket in self.replica.buckets.buckets:
            for view in bucket.layout.views:
                yield view.name, view.parameter, bucket.places[view.name]

    # ---------------------------------------------------------------- a step

    @contextmanager
    def part(self, part: Part) -> Iterator[Part]:
        """One worker's forward and backward. Its BatchNorm groups, dropout masks and torch's own generator are those
        of (seed, step, worker), so random augmentation belongs in here too."""
        if self._part is not None:
            raise RunError(
                f"run.part: worker {part.worker}'s inside worker {self._part.worker}'s: a pass is of one worker, so "
                "that no number of ranks changes which samples are computed together"
            )
        self._begin(part.step)
        if part.step.reduced:
            raise RunError(f"run.part: step {part.step.step} was reduced already, and a part more would not be in it")
        replica, point = self.replica, part.step.point
        replica.begin_pass(point.step, [part.worker], [part.count])
        replica.buckets.arm(part.last, point.measured)
        self._part, self._losses_went = part, False
        try:
            yield part
            if not self._losses_went:
                raise RunError(
                    f"run.part: worker {part.worker}'s ended without run.backward(losses): its gradients are in no sum"
                )
        except BaseException:
            self._step = None  # what this rank has of the step is void
            raise
        finally:
            self._part = None
            replica.end_pass()
        self._passes += 1

    def backward(self, losses: torch.Tensor) -> None:
        """Inside `part`, once: `losses` holds one a sample, shape (n,); their sum over kn is differentiated, so that
        the sum over all workers is the gradient of the mean (Goyal et al. 2017, Remark 3), in a tail too.

        Raises RequestError for another shape: a mean over a batch would be divided twice.
        """
        part, replica = self._part, self.replica
        if part is None:
            raise RunError(
                "run.backward: outside of `with run.part(part)`, where no worker is known that losses are of"
            )
        if self._losses_went:
            raise RunError("run.backward: a second time in one part; add the losses, sample by sample, and go once")
        if losses.dim() == 0:
            raise RequestError(
                "run.backward: a scalar loss, and it must be one a sample, shape (n,): reduction='none' in torch's "
                "losses; the mean over the global batch is taken over all ranks"
            )
        if losses.shape != (part.count,):
            what = "several workers in one backward, or " if losses.shape[0] > part.count else ""
            raise RequestError(
                f"run.backward: losses of shape {tuple(losses.shape)} for the {part.count} samples of worker "
                f"{part.worker}: {what}not one a sample; go part by part, and take each sample's own sum or mean"
            )
        point = part.step.point
        replica.end_forward(groups_in_step(point, replica.context.bn_group))
        self._losses[part.worker] = losses.detach().sum()
        replica.share(losses.sum(), part.count, point).backward()  # type: ignore[no-untyped-call]
        square = replica.buckets.end_pass()
        if square is not None:
            self._squares[part.worker] = square
        self._losses_went = True

    def reduce(self, step: Step) -> Verdict:
        """Sum the step over all ranks; afterwards every parameter's `.grad` is the gradient of the mean over the
        global batch, on every rank, to be clipped or looked at. Collective; a rank without parts calls it too."""
        if self._part is not None:
            raise RunError("run.reduce: inside of `with run.part(part)`")
        self._begin(step)
        if step.reduced:
            raise RunError(f"run.reduce: step {step.step} was reduced already; its sums would be summed again")
        if self._passes < len(step.mine):
            raise RunError(
                f"run.reduce: step {step.step}: {self._passes} of this rank's {len(step.mine)} parts were computed"
            )
        buckets, engine, point, control = self.replica.buckets, self.world.engine, step.point, self._control
        if not self._passes:
            buckets.join_idle()
        bad = ~torch.isfinite(self._losses.sum())
        if buckets.fixed:
            bad |= buckets.fixed.out_of_range
        control[COUNT] = sum(stop - start for start, stop in map(point.worker_range, step.mine))
        control[BAD_RANKS] = bad
        control[BAD_RANK_SUM] = bad * engine.rank
        handle = engine.start_sum(control, "control")  # after all buckets: some engines match sums by order
        finite = buckets.finish()
        engine.wait(handle)
        big_square = buckets.square() if point.measured else control[COUNT]
        sums = torch.cat([control, torch.stack([big_square, finite.double()])]).tolist()
        k, bad_ranks = point.workers, round(sums[BAD_RANKS])
        of_workers, squares = sums[WORKERS : WORKERS + k], sums[WORKERS + k : WORKERS + 2 * k]
        ok = bool(sums[-1]) and not bad_ranks
        step.reduced, self._sound, self.step = True, ok, point.step + 1
        return Verdict(
            finite=ok,
            loss=math.fsum(of_workers) / round(sums[COUNT]) if all(map(math.isfinite, of_workers)) else math.nan,
            count=round(sums[COUNT]),
            bad_ranks=bad_ranks,
            bad_rank=round(sums[BAD_RANK_SUM]) if bad_ranks == 1 else None,
            measurement=measurement_of(point, squares, sums[-2]) if point.measured and ok else None,
        )

    @property
    def between_steps(self) -> bool:
        """Nothing is under way: the last step was taken, or given up for its verdict."""
        return self._step is None or (self._step.reduced and not self._sound)

    def _begin(self, step: Step) -> None:
        """A step's first part or, on a rank without one, its reduce."""
        if step is self._step:
            if not step.reduced:
                self._refuse_replaced()
            return
        if step.reduced:
            raise RunError(f"step {step.step} was reduced already, and is over")
        self._place_gradients()
        k = step.point.workers
        self.replica.context.bn_group = self._bn_group or step.point.samples_per_worker
        self.replica.buckets.begin(k)
        self._control = torch.zeros(WORKERS + 2 * k, dtype=torch.float64, device=self.world.device)
        self._losses, self._squares = self._control[WORKERS : WORKERS + k], self._control[WORKERS + k :]
        self._step, self._passes, step.begun = step, 0, True

    # ---------------------------------------------------------------- the optimizer

    def _place_gradients(self) -> None:
        """Every parameter's gradient in its bucket again, whichever zero_grad there was."""
        for parameter, place in self._places.values():
            parameter.grad = place

    def _refuse_replaced(self) -> None:
        for name, (parameter, place) in self._places.items():
            if parameter.grad is not place:
                raise RunError(
                    f"the gradient of {name} was replaced between the parts of step {self.step}: clear gradients after "
                    "optimizer.step(), not inside a step"
                )

    def _zero_grad(self, set_to_none: bool = True) -> None:
        """In place of the optimizer's: gradients live in buckets, and stay there in either form."""
        if self._step is not None and not self._step.reduced and self._passes:
            raise RunError("optimizer.zero_grad: between the parts of a step, whose sums it would take away")
        self.replica.buckets.clear()
        self._place_gradients()

    def _before_update(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        given = [value for value in (*args[1:], *kwargs.values()) if value is not None]
        if given:
            raise RequestError(
                "optimizer.step(closure): a closure computes forward and backward again, outside of the parts that are "
                "summed over ranks; call optimizer.step() after run.reduce(step)"
            )
        if self._step is None or not self._step.reduced:
            raise RunError("optimizer.step: before run.reduce(step), this rank's gradients are not the sum over all")
        if not self._sound:
            raise RunError(
                f"optimizer.step: the gradients of step {self._step.step} are not finite; "
                "`if run.reduce(step): optimizer.step()`"
            )

    def _after_update(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        assert self._step is not None
        self.replica.running.update(self.replica.buckets.statistics, self._step.point.share)
        self._step = None


def distribute(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    determinism: Determinism | None = None,
    *,
    seed: int = 0,
    bn_group: int | None = None,
    bucket_mb: float = 25.0,
    norm_calls: Mapping[str, int] | None = None,
    fixed_point_bits: int = 40,
) -> Run:
    """Put a model and its torch.optim optimizer on all ranks; rank 0's weights are everyone's. Collective, once.

    The model stays the user's: its parameters and their gradients become views into a few flat buckets, its BatchNorm
    layers normalise groups of `bn_group` samples (default: a worker's n) and measure over all ranks, its dropout masks
    are those of (seed, layer, step, worker).

    determinism        as `lb.init` has it (default)
    bucket_mb          size of a bucket, in MiB; each is summed as soon as its gradients are there
    norm_calls         {name: calls in a forward} of BatchNorm layers that are called more than once
    fixed_point_bits   any-ranks: sums are taken in int64 units of 2**-bits

    Raises RequestError, with the name, for what cannot be distributed.
    """
    world = current("lb.distribute")
    if determinism not in (None, world.determinism):
        raise RequestError(
            f"lb.distribute(determinism={determinism!r}): lb.init settled {world.determinism} for this process"
        )
    if bucket_mb <= 0 or (bn_group is not None and bn_group < 1) or not 8 <= fixed_point_bits <= 52:
        raise RequestError(
            f"lb.distribute(bucket_mb={bucket_mb}, bn_group={bn_group}, fixed_point_bits={fixed_point_bits}): "
            "above 0; at least 1; 8 to 52"
        )
    _refuse_unfit(model, optimizer)
    return Run(model, optimizer, world, seed, bn_group, bucket_mb, norm_calls, fixed_point_bits)


def _refuse_unfit(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    refuse_closure(optimizer, f"lb.distribute: {type(optimizer).__name__}")
    refuse_sparse(optimizer, f"lb.distribute: {type(optimizer).__name__}")
    wrapped = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    if isinstance(model, wrapped) or any("DistributedOptimizer" in c.__name__ for c in type(optimizer).__mro__):
        raise RequestError("lb.distribute: takes the bare model and optimizer; it sums gradients itself")
    if "zero_grad" in vars(optimizer):
        raise RequestError("lb.distribute: this optimizer was distributed already; make a new one")
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise RequestError("lb.distribute: the model has no parameter that trains")
    types = {p.dtype for p in named.values()}
    if len(types) > 1 or not types <= {torch.float32, torch.float64}:
        raise RequestError(
            f"lb.distribute: parameters of {', '.join(sorted(map(str, types)))}: all float32, or all float64; forward "
            "may compute in bfloat16 (torch.autocast)"
        )
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if missed := [name for name, p in named.items() if id(p) not in stepped]:
        raise RequestError(
            f"lb.distribute: {missed[0]} is in none of the optimizer's groups, and no step would move it: add it, or "
            "set requires_grad to False"
        )
    if stepped - {id(p) for p in model.parameters()}:
        raise RequestError("lb.distribute: the optimizer has parameters that are not the model's")

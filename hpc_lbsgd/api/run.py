"""A model and an optimizer of the user's, under the trainer's buckets and virtual workers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from hpc_lbsgd.api.fit import DISTRIBUTED, refuse_unfit, refuse_unlike, refuse_unlike_shuffle, share_optimizer
from hpc_lbsgd.api.keyed import own_random_numbers
from hpc_lbsgd.api.result_part import Past, ResultPart
from hpc_lbsgd.api.shuffle import GlobalShuffle, Part, Step
from hpc_lbsgd.api.verdict import Verdict
from hpc_lbsgd.api.watch import Watch
from hpc_lbsgd.api.world import Determinism, World, current
from hpc_lbsgd.errors import RequestError, RunError
from hpc_lbsgd.theory.schedule import Point
from hpc_lbsgd.train.control import COUNT_FLUSHED_EVERY, Control
from hpc_lbsgd.train.replica import Distributed, unfold_expanded
from hpc_lbsgd.train.verdict import FLUSHED_STOP, FLUSHED_WARN
from hpc_lbsgd.train.workers import groups_in_step

FIRST_BUCKET_MB = 1.0  # so that communication starts early
CHECK_EVERY = 100  # steps; ranks compare their weights
OUTSIDE = (
    "in training mode outside of run.part it would measure this rank's own samples, or draw this rank's own mask: go "
    "forward inside of the part, or call model.eval() first; the model of another run, as in a GAN, has eval() or a "
    "part of its own"
)


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
        self._watch = Watch(self.replica, world)
        self.past = Past(world.determinism, seed, bn_group, fixed_point_bits)
        self._shuffles: WeakSet[GlobalShuffle] = WeakSet()  # that all ranks were found to have
        self._lost_said, self._untaken_said = 0.0, False
        self._loaded: int | None = None  # the step that `lb.load` said, until one is begun
        self._step: Step | None = None  # under way
        self._part: Part | None = None  # of the pass under way
        self._losses_went = self._sound = self._ever_sound = False
        self._passes = 0
        optimizer.register_step_pre_hook(self._before_update)
        optimizer.register_step_post_hook(self._after_update)
        optimizer.zero_grad = self._zero_grad  # type: ignore[method-assign]
        self.replica.synchronise()
        share_optimizer(world.engine, optimizer)
        self.replica.context.outside = OUTSIDE
        for _, parameter, *_ in self._watch.places:
            setattr(parameter, DISTRIBUTED, True)

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
        if self in part.step.reduced:
            raise RunError(f"run.part: step {part.step.step} was reduced already, and a part more would not be in it")
        self._refuse_out_of_turn(part)
        replica, point = self.replica, part.step.point
        others = self._watch.others()
        with own_random_numbers():
            replica.begin_pass(point.step, [part.worker], [part.count])
            replica.buckets.arm(part.last, point.measured)
            self._part, self._losses_went = part, False
            try:
                yield part
                if not self._losses_went:
                    raise RunError(
                        f"run.part: worker {part.worker}'s ended without run.backward(losses): its gradients are in no "
                        "sum"
                    )
                self._watch.check_gradients(point.step)
                self._watch.check_others(others)
            except BaseException:
                self._step = None  # what this rank has of the step is void
                raise
            finally:
                self._part = None
                replica.end_pass()
        self._passes += 1

    def _refuse_out_of_turn(self, part: Part) -> None:
        mine = part.step.mine
        due = mine[self._passes] if self._passes < len(mine) else None
        if part.worker != due:
            raise RunError(
                f"run.part: worker {part.worker}'s, where {'none is' if due is None else f'worker {due} is'} due: each "
                "of step.workers goes once, in their order; after an error in a part the step begins with its first"
            )

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
        self._control.losses[part.worker] = losses.detach().sum()
        replica.share(losses.sum(), part.count, point).backward()  # type: ignore[no-untyped-call]
        square = replica.buckets.end_pass()
        if square is not None:
            self._control.squares[part.worker] = square
        self._watch.note_gradients()
        self._losses_went = True

    def reduce(self, step: Step) -> Verdict:
        """Sum the step over all ranks; afterwards every parameter's `.grad` is the gradient of the mean over the
        global batch, on every rank, to be clipped or looked at. Collective; a rank without parts calls it too."""
        if self._part is not None:
            raise RunError("run.reduce: inside of `with run.part(part)`")
        self._begin(step)
        if self in step.reduced:
            raise RunError(f"run.reduce: step {step.step} was reduced already; its sums would be summed again")
        if self._passes < len(step.mine):
            raise RunError(
                f"run.reduce: step {step.step}: {self._passes} of this rank's {len(step.mine)} parts were computed"
            )
        point = step.point
        if not self._passes:
            self.replica.buckets.join_idle()
        self._control.start(sum(stop - start for start, stop in map(point.worker_range, step.mine)))
        self._control.finish()
        verdict = Verdict.of(point, self._control.read())
        self._refuse_lost(point, verdict)
        self._refuse_apart(point.step, point.step == step.shuffle.schedule.steps - 1)
        step.reduced.add(self)
        self._sound, self.step = verdict.finite, point.step + 1
        self.past.taken(step)
        return verdict

    def _refuse_lost(self, point: Point, verdict: Verdict) -> None:
        """Say where fixed point makes gradients zero; a run whose first step has little else is not begun."""
        fixed, lost = self.replica.buckets.fixed, verdict.flushed or 0.0
        if not verdict.finite or not fixed or lost <= max(FLUSHED_WARN, 2 * self._lost_said):
            return
        self._lost_said = lost
        said = (
            f"run.reduce: step {point.step}: {lost:.0%} of gradients that are not zero are below 2^-{fixed.bits + 1}, "
            f"and any-ranks makes them zero: raise lb.distribute(fixed_point_bits={fixed.bits}), at most 52, or scale "
            "the losses up and the learning rate down"
        )
        if lost > FLUSHED_STOP and not self._ever_sound:
            raise RunError(said, everywhere=True)
        if self.world.rank == 0:
            warnings.warn(said, stacklevel=3)

    def _refuse_apart(self, step: int, last: bool) -> None:
        """Raise RunError on all ranks where their weights differ: soon after the start, for what a script does on one
        rank alone (a learning rate, a file that is loaded) shows at once; then now and then, and at the end. Here, for
        all ranks come to each `reduce` in one order, whoever has parts."""
        if self.world.size > 1 and (step & (step - 1) == 0 or step % CHECK_EVERY == 0 or last):
            self.replica.check_equal(f"sum of step {step}")

    @property
    def between_steps(self) -> bool:
        """Nothing is under way: the last step was taken, or given up for its verdict."""
        return self._step is None or (self in self._step.reduced and not self._sound)

    def check_model(self) -> None:
        """Raise RunError where the model is not as it was distributed."""
        self._watch.check()

    def resume_at(self, step: int, saved: ResultPart | None, where: str) -> None:
        """Of `lb.load`: the step to go on from, which the next one must be; saved, where: as `Past.load` has them."""
        self.step = self._loaded = step
        self.past.load(saved, where)

    def _begin(self, step: Step) -> None:
        """A step's first part or, on a rank without one, its reduce."""
        if step is self._step:
            if self not in step.reduced:
                self._watch.check_gradients(step.step)
            return
        if self in step.reduced:
            raise RunError(f"step {step.step} was reduced already, and is over")
        self._refuse_another_place(step)
        self._say_untaken()
        self._watch.check()
        point, buckets = step.point, self.replica.buckets
        self._end_sums()
        if step.shuffle not in self._shuffles:
            refuse_unlike_shuffle(self.world.engine, step.shuffle)
            self._shuffles.add(step.shuffle)
        self.past.follow(step, self.world.rank)
        self._place_gradients()
        self.replica.context.bn_group = self._bn_group or point.samples_per_worker
        buckets.begin(point.workers, count_flushed=not self._ever_sound or point.step % COUNT_FLUSHED_EVERY == 0)
        self._watch.note_gradients()
        self._control = Control(point, buckets)
        self._step, self._passes, self._loaded = step, 0, None
        step.begun.add(self)

    def _say_untaken(self) -> None:
        """Where the step before was summed and not taken: in scripts that accumulate gradients, three of four, say."""
        if self._step is None or self.between_steps or self not in self._step.reduced or self._untaken_said:
            return
        self._untaken_said = True
        if self.world.rank == 0:
            warnings.warn(
                f"step {self._step.step} was reduced, and optimizer.step() did not follow: its gradients are gone, for "
                "each step begins with gradients of zero. To accumulate over more samples, take more workers",
                stacklevel=4,
            )

    def _end_sums(self) -> None:
        """Of a step that was given up after they had begun, where nobody else waits for them."""
        buckets = self.replica.buckets
        if self.world.size > 1 and any(bucket.handle is not None for bucket in buckets.buckets):
            raise RunError(
                "the step before was given up on this rank after its sums had begun, and other ranks wait for them: "
                "end the script on all ranks, and go on from what lb.save kept"
            )
        buckets.drop()

    def _refuse_another_place(self, step: Step) -> None:
        shuffle, world = step.shuffle, self.world
        if (shuffle.rank, shuffle.size) != (world.rank, world.size):
            raise RunError(
                f"step {step.step} is of rank {shuffle.rank} of {shuffle.size}, and this is rank {world.rank} of "
                f"{world.size}: make lb.GlobalShuffle (lb.Loader) after lb.init, without rank= and size="
            )
        if self._loaded is not None and self._loaded == self.step != step.step:
            raise RunError(
                f"lb.load said to go on from step {self._loaded}, and this is step {step.step}: "
                f"lb.GlobalShuffle(..., start={self._loaded}); for another schedule from its beginning, run.step = 0"
            )

    # ---------------------------------------------------------------- the optimizer

    def _place_gradients(self) -> None:
        """Every parameter's gradient in its bucket again, whichever zero_grad there was."""
        for _, parameter, _, place, _ in self._watch.places:
            parameter.grad = place

    def _zero_grad(self, set_to_none: bool = True) -> None:
        """In place of the optimizer's: gradients live in buckets, and stay there in either form."""
        if self._step is not None and self not in self._step.reduced and self._passes:
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
        if self._step is None or self not in self._step.reduced:
            raise RunError("optimizer.step: before run.reduce(step), this rank's gradients are not the sum over all")
        if not self._sound:
            raise RunError(
                f"optimizer.step: the gradients of step {self._step.step} are not finite; "
                "`if run.reduce(step): optimizer.step()`"
            )
        self._watch.check_optimizer(optimizer)

    def _after_update(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._step is None:  # taken by the step of a parent class, inside of this one
            return
        self.replica.running.update(self.replica.buckets.statistics, self._step.point.share)
        self._step, self._ever_sound = None, True


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
    refuse_unfit(model, optimizer, norm_calls)
    refuse_unlike(
        world, model, optimizer, seed=seed, bn_group=bn_group, bucket_mb=bucket_mb, norm_calls=norm_calls,
        fixed_point_bits=fixed_point_bits,
    )  # fmt: skip
    return Run(model, optimizer, world, seed, bn_group, bucket_mb, norm_calls, fixed_point_bits)

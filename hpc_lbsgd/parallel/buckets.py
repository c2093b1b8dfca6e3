"""Gradients and weights of a model as views into a few flat buffers, one allreduce a buffer.

A bucket is reduced as soon as its last gradient of the last pass is there, while backward goes on. No copy into
or out of a fusion buffer, no negotiation by tensor, and the optimizer runs over a few long vectors
(Yamazaki et al. 2019: static groups of several MB). Run-time fusion is the same code with a bucket a tensor.
"""

from __future__ import annotations

import torch
from torch import nn

from hpc_lbsgd.errors import RunError
from hpc_lbsgd.parallel.engine import Engine
from hpc_lbsgd.parallel.fixed_point import Digest, FixedPoint
from hpc_lbsgd.parallel.layout import Layout
from hpc_lbsgd.parallel.scales import Scales


class Bucket:
    """One flat buffer of gradients, the weights beside it, and the sum under way."""

    def __init__(self, index: int, layout: Layout, device: torch.device, dtype: torch.dtype):
        self.index, self.layout = index, layout
        self.gradients = torch.zeros(layout.size, dtype=dtype, device=device)
        self.weights = torch.zeros(layout.size, dtype=dtype, device=device)
        self.places: dict[str, torch.Tensor] = {}  # of gradients, by parameter
        for view in layout.views:
            place = view.of(self.weights)
            place.copy_(view.parameter.data)
            view.parameter.data = place
            view.parameter.grad = self.places[view.name] = view.of(self.gradients)
        self.names = frozenset(view.name for view in layout.views)
        self.missing: set[str] = set()  # gradients still to come in this pass
        self.full = False
        self.handle = None


class Buckets:
    """All buckets of a model: armed before each backward, finished after the last of a step.

    bits        None: floating-point sums. Else sums over workers are whole numbers of units (`any-ranks`): int64 and
                2**-bits, or (int32) as `FixedPoint` has it
    wire        None: gradients travel as computed. Else in this type, times this power of two

    Where the engine's own model sums gradients (`engine.sums_gradients`), only BatchNorm's statistics and the sums of
    measured steps travel from here.
    """

    def __init__(
        self,
        layouts: list[Layout],
        engine: Engine,
        device: torch.device,
        dtype: torch.dtype,
        bits: int | None = None,
        wire: tuple[torch.dtype, float] | None = None,
        int32: bool = False,
    ):
        self.engine, self.device, self.dtype = engine, device, dtype
        self.buckets = [Bucket(i, layout, device, dtype) for i, layout in enumerate(layouts)]
        flats = [b.gradients for b in self.buckets]
        self.fixed = FixedPoint(flats, layouts, bits, int32) if bits is not None else None
        self.wires = None
        if wire is not None:
            wire_dtype, self.wire_scale = wire
            self.wires = [
                torch.zeros(b.layout.size if b.layout.narrow else 0, dtype=wire_dtype, device=device)
                for b in self.buckets
            ]
        self.places = sorted((name, place) for b in self.buckets for name, place in b.places.items())
        self._armed = self._last_pass = self._measured = self._apart = False
        self._digest: Digest | None = None
        self._held: list[torch.Tensor] | None = None  # sums of passes while each is measured by itself
        for bucket in self.buckets:
            for view in bucket.layout.views:
                view.parameter.register_post_accumulate_grad_hook(
                    lambda parameter, bucket=bucket, name=view.name: self._arrived(bucket, name, parameter)
                )

    # ---------------------------------------------------------------- one step

    def begin(self, workers: int, count_flushed: bool = False) -> None:
        """Start a step of `workers` workers over all ranks. count_flushed: count gradients that fixed point rounds to
        zero (`flushed`)."""
        for bucket in self.buckets:
            bucket.gradients.zero_()
        self._held = None  # of a measured step that was given up
        self._ready, self._next = set(), 0
        # gradients of this rank that are not zero, and those of them that fixed point or a float16 wire made zero
        narrow = self.wires is not None and self.wires[0].dtype == torch.float16  # bfloat16 has float32's range
        count = count_flushed and (self.fixed is not None or narrow)
        self.flushed = torch.zeros(2, dtype=torch.float64, device=self.device) if count else None
        if self.fixed:
            self.fixed.begin(workers, self.flushed)

    def arm(self, last_pass: bool, measured: bool = False, digest: Digest | None = None, apart: bool = False) -> None:
        """Before each forward-backward; after the last one of the step, buckets leave as they fill.

        digest: is called with each bucket's whole numbers of this pass (any-ranks). apart: the pass adds nothing to the
        step; it is computed for its digests.

        measured: `end_pass` is to return this pass's squared norm. Buckets then stay until it has been taken, and the
        sum of the passes before lies in a second buffer.
        """
        self._last_pass, self._measured, self._digest, self._apart = last_pass, measured, digest, apart
        self._armed = True
        for bucket in self.buckets:
            bucket.missing, bucket.full = set(bucket.names), False

    @property
    def summed_elsewhere(self) -> bool:
        """In this step the engine's model sums the gradients."""
        return self.engine.sums_gradients and not self._measured

    def _arrived(self, bucket: Bucket, name: str, parameter: nn.Parameter) -> None:
        if not self._armed:
            raise RunError(f"{name} got a gradient outside the passes of a step, which would not be summed over ranks")
        if parameter.grad is not bucket.places[name]:
            raise RunError(
                f"the gradient of {name} is not in its bucket: the model or the loss has put another in its place "
                "(zero_grad, .grad = None); gradients are the trainer's to clear"
            )
        if name not in bucket.missing:  # its bucket may have left
            raise RunError(
                f"{name} got a gradient twice in one backward: what is used more than once cannot be inside "
                "torch.utils.checkpoint with use_reentrant=True; set use_reentrant=False"
            )
        bucket.missing.discard(name)
        if not (bucket.missing or self._measured or self.engine.sums_gradients):
            self._fill(bucket)

    def _fill(self, bucket: Bucket) -> None:
        bucket.full = True
        if self.fixed:
            self.fixed.add(bucket.index, self._last_pass, self._digest, self._apart)
        if self._last_pass:
            self._launch(bucket)

    def end_pass(self) -> torch.Tensor | None:
        """After each backward: parameters that the pass did not use count as arrived, with a zero gradient.

        Returns |gradient of this pass|^2, a float64 scalar on the device, if the pass was armed to be measured.
        """
        if self.summed_elsewhere and self._last_pass:
            self._refuse_unused()
        self._armed = False
        square = self.square() if self._measured else None
        if self._measured and not self.fixed:
            self._hold()
        for bucket in self.buckets:
            if not bucket.full:
                self._fill(bucket)
        if self.fixed and not self._apart:
            self.fixed.end_pass()
        return square

    def _refuse_unused(self) -> None:
        unused = sorted(name for bucket in self.buckets for name in bucket.missing)
        if unused:
            raise RunError(
                f"machine.engine = {self.engine.name}: no gradient for {', '.join(unused[:5])}"
                + (f" and {len(unused) - 5} more" if len(unused) > 5 else "")
                + ": DistributedDataParallel cannot sum where a step leaves parameters unused; freeze them, or use "
                "machine.engine = horovod or torch"
            )

    def _hold(self) -> None:
        """Put a measured pass aside; with the last one, bring back the sum of all."""
        if self._held is None and not self._last_pass:
            self._held = [torch.zeros_like(b.gradients) for b in self.buckets]
        if self._held is None:  # one pass is all there is
            return
        for bucket, held in zip(self.buckets, self._held, strict=True):
            if self._last_pass:
                bucket.gradients.add_(held)
                held.zero_()
            else:
                held.add_(bucket.gradients)
                bucket.gradients.zero_()

    def square(self) -> torch.Tensor:
        """|gradient|^2 over all parameters, float64 scalar on the device; whatever the buckets' layout."""
        norms = [torch.linalg.vector_norm(place, dtype=torch.float64) for _, place in self.places]
        return torch.stack(norms).square().sum()

    def join_idle(self) -> None:
        """In place of passes, on a rank without workers: its zeros."""
        for bucket in self.buckets:
            if self.fixed:
                self.fixed.clear(bucket.index)
            self._launch(bucket)

    def _launch(self, bucket: Bucket) -> None:
        """Begin the sum of a bucket that is complete.

        Which one fills first is each rank's own affair: another branch, a layer without a gradient, no worker at all.
        An engine that matches sums by name takes them as they come. Elsewhere a bucket waits for those before it: out
        of order NCCL would hang, and Gloo would add buffers of one size that do not belong together.
        """
        if self.engine.named_sums:
            return self._begin_sum(bucket)
        self._ready.add(bucket.index)
        while self._next in self._ready:
            self._begin_sum(self.buckets[self._next])
            self._next += 1

    def _begin_sum(self, bucket: Bucket) -> None:
        tensor = bucket.gradients
        if self.summed_elsewhere:
            tensor = tensor[: bucket.layout.statistics]
            if not len(tensor):
                return
        if self.fixed:
            tensor = self.fixed.sums(bucket.index)
        elif bucket.layout.narrow:
            tensor = self.wires[bucket.index]
            torch.mul(bucket.gradients, self.wire_scale, out=bucket.gradients)
            tensor.copy_(bucket.gradients)
            if self.flushed is not None:
                before, after = (torch.count_nonzero(t) for t in (bucket.gradients, tensor))
                self.flushed += torch.stack([before, before - after])
        bucket.handle = self.engine.start_sum(tensor, f"bucket.{bucket.index}")

    def finish(self) -> torch.Tensor:
        """Wait for all sums. Returns a bool scalar on the device: every reduced value is finite."""
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        for bucket in self.buckets:
            if bucket.handle is not None:
                self.engine.wait(bucket.handle)
                bucket.handle = None
            if self.fixed:  # always finite
                self.fixed.take(bucket.index)
                continue
            if bucket.layout.narrow:
                bucket.gradients.copy_(self.wires[bucket.index]).mul_(1 / self.wire_scale)
            finite &= torch.isfinite(bucket.gradients.sum())
        return finite

    def drop(self) -> None:
        """Wait for the sums of a step that is given up."""
        for bucket in self.buckets:
            if bucket.handle is not None:
                self.engine.wait(bucket.handle)
                bucket.handle = None

    # ---------------------------------------------------------------- beside the step

    def local_sums(self) -> list[torch.Tensor]:
        """What this rank's passes of a step that has not left added up to: totals in fixed point, or statistics and
        gradients apart."""
        if self.fixed:
            return [self.fixed.sums(b.index) for b in self.buckets]
        halves = ((b.gradients[: b.layout.statistics], b.gradients[b.layout.statistics :]) for b in self.buckets)
        return [part for both in halves for part in both if part.numel()]

    @property
    def rounded_by(self) -> str | None:
        """What makes whole numbers of gradients: C, Triton or torch; None: they stay as they are."""
        return (self.fixed.kernels.MADE_BY if self.fixed.kernels else "torch") if self.fixed else None

    @property
    def scales(self) -> Scales | None:
        """Of sums in int32."""
        return self.fixed.scales if self.fixed else None

    def clear(self) -> None:
        """Leave no gradients behind; statistics stay."""
        for bucket in self.buckets:
            bucket.gradients[bucket.layout.statistics :].zero_()

    @property
    def statistics(self) -> torch.Tensor:
        """Where BatchNorm's statistics ride: the head of the first bucket, or a bucket of their own."""
        bucket = next((b for b in self.buckets if b.layout.statistics), self.buckets[0])
        return bucket.gradients[: bucket.layout.statistics]

    def named(self, flats: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Flat buffers of the buckets' sizes (momentum, say) by parameter name, as views."""
        return {
            view.name: view.of(flat)
            for bucket, flat in zip(self.buckets, flats, strict=True)
            for view in bucket.layout.views
        }

    def broadcast_weights(self) -> None:
        """Rank 0's weights on every rank."""
        for bucket in self.buckets:
            self.engine.broadcast(bucket.weights, f"weights.{bucket.index}")

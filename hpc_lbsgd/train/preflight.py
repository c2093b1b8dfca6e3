"""Preflight: before the first step a run checks its own promise, on its own model, data and ranks.

    data       decoded twice, a sample is the same
    state      forward changes nothing but BatchNorm's statistics
    model      the model as its author wrote it and as it trains give the same outputs, gradients and statistics
    masks      dropout has its rate, and differs by call and worker
    groups     where a pass holds several BatchNorm groups: they do not meet
    workers    two workers computed apart add up to both in one step, here and over two ranks
    optimizer  where it is not ours: all that its next step needs is in its state, and a checkpoint can hold that
    ranks      under any-ranks, every rank decodes and computes worker 0 to the same bits, as at the run's first start

`before` runs without ranks and says how often BatchNorm layers are called; `after` runs on the replica, on all ranks.
"""

from __future__ import annotations

import hashlib
import socket
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from hpc_lbsgd.data.order import stream_key
from hpc_lbsgd.data.source import Batch
from hpc_lbsgd.data.targets import Targets, each_tensor, joined, rows, tensors
from hpc_lbsgd.errors import RequestError, RunError
from hpc_lbsgd.parallel import world as worlds
from hpc_lbsgd.parallel.agree import together
from hpc_lbsgd.theory.schedule import Point
from hpc_lbsgd.train import metrics, models, own_optim, probe
from hpc_lbsgd.train.losses import loss_function
from hpc_lbsgd.train.optim import Optimizer
from hpc_lbsgd.train.replica import DTYPES, Replica, outputs, weights_sha256
from hpc_lbsgd.train.workers import groups_in_step

SHOWN = 8  # tensors of a batch that a message shows


class Check(NamedTuple):
    check: str
    ok: bool
    what: str


class Before(NamedTuple):
    """What is known before the replica is laid out."""

    calls: dict[str, int]  # of BatchNorm layers in a forward
    checks: list[Check]
    weights: str  # SHA-256 of the author's model at its start


def before(
    recipe, classes: int, batches: Mapping[int, Batch], device: torch.device, memory_format, full: bool
) -> Before:
    """Run the author's model on up to 8 samples of the first workers. full: and the one that trains, beside it.

    Raises RequestError where forward changes state that is not accounted for, or the loss has the wrong shape: neither
    can be trained, whatever else is checked.
    """
    dtype = DTYPES[recipe.precision]

    def build() -> torch.nn.Module:
        model = models.build(recipe.model, recipe.data.channels, classes, recipe.seed, dtype)
        return model.to(device, memory_format=memory_format)

    call = probe.Call(
        joined([inputs for inputs, *_ in batches.values()]),
        joined([labels for _, labels, *_ in batches.values()]),
        loss_function(recipe.train),
        # a model may work in place
        lambda model, inputs: outputs(
            model, each_tensor(torch.clone, inputs), dtype, device, recipe.precision == "bf16"
        ),
        stream_key("model", recipe.seed, 0, 0),
    ).part(0, probe.SAMPLES)
    own = build()
    weights = weights_sha256(own)
    kept: list[str] = []
    try:
        seen = probe.look(own, call)
        probe.refuse_state(own, seen.changed)
        if full:
            probe.refuse_state(own, probe.followers(own, call), "each forward once its weights have moved")
            kept = probe.remembers(build, call)
        if recipe.data.eval or recipe.data.dataset:
            probe.refuse_state(own, probe.changed_by_evaluation(own, call), "an evaluation")
            probe.try_metrics(own, call, metrics.load_all(recipe.train.metrics))
    except (RequestError, RunError):
        raise
    except Exception as problem:  # a model, a loss and data that anyone may have written
        if "more than 1 value per channel" in str(problem):
            raise RequestError(
                f"batch.samples_per_worker = {recipe.batch.samples_per_worker}: BatchNorm gets one value a channel, "
                f"and has nothing to normalise by ({problem}); use more samples a worker"
            ) from None
        raise RequestError(f"the first step cannot be computed: {fault(problem, call)}") from None
    what = "forward changes nothing but BatchNorm's statistics"
    if kept:
        more = f" (and {len(kept) - 1} more)" if len(kept) > 1 else ""
        what = (
            f"{kept[0]}{more} is another where other samples went before: an attribute that every rank and pass would "
            "change by itself, and no checkpoint keeps"
        )
    checks = [Check("state", not kept, what)]
    again = build() if full else None
    if full and weights_sha256(again) != weights:
        what = "its starting weights are others each time it is made; they must come from torch's generator"
        return Before(dict(seen.calls), [*checks, Check("model", False, what)], weights)
    if full:
        checks += compare(recipe, build, call, seen, dtype, device, again)
        if seen.draws and recipe.machine.workers_per_pass > 1:
            checks.append(
                Check(
                    "masks",
                    False,
                    f"the model draws from torch's generator outside nn.Dropout, and machine.workers_per_pass = "
                    f"{recipe.machine.workers_per_pass} would let workers share what it draws; allowed: 1",
                )
            )
    return Before(dict(seen.calls), checks, weights)


def fault(problem: Exception, call: probe.Call) -> str:
    """What went wrong in a forward or backward, with what, and where in its author's code."""
    frames = traceback.extract_tb(problem.__traceback__)
    place = next((f for f in reversed(frames) if "/torch/" not in f.filename), frames[-1])
    return (
        f"{type(problem).__name__}: {problem} ({place.filename}:{place.lineno}, {place.line}); inputs are "
        f"{shapes(call.inputs)}, labels {shapes(call.labels)}"
    )


def shapes(held: Targets) -> str:
    """Types and shapes, of a list its first ones."""
    found = [f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in tensors(held)]
    names = f" (by name: {', '.join(held)})" if isinstance(held, dict) else ""
    return ", ".join(found[:SHOWN]) + " ..." * (len(found) > SHOWN) + names


def compare(recipe, build, call: probe.Call, seen: probe.Seen, dtype, device, fresh=None) -> list[Check]:
    """The author's model and the one that trains. fresh: the author's, made already."""
    perturbed = probe.look(build() if fresh is None else fresh, call.perturbed()).values
    virtual = probe.VirtualModel(build(), recipe.seed, seen.calls, dtype, device)
    wrong = probe.difference(seen.values, virtual.look(call), perturbed)
    if wrong:
        again = probe.VirtualModel(build(), recipe.seed, seen.calls, dtype, device)
        wrong += f"; the first module that differs: {probe.first_module(build(), again, call)}"
    count = rows(call.labels)
    mask = probe.wrong_mask(virtual, device)
    checks = [
        Check("model", not wrong, wrong or f"trains as it was written ({count} samples, {len(seen.values)} tensors)"),
        Check("masks", not mask, mask or "dropout differs by call and worker"),
    ]
    several = recipe.batch.group < recipe.batch.samples_per_worker or recipe.machine.workers_per_pass > 1
    if several and count >= 4 and not seen.draws:
        checks.append(compare_groups(recipe, build, call, seen, dtype, device))
    return checks


def compare_groups(recipe, build, call: probe.Call, seen: probe.Seen, dtype, device) -> Check:
    """Two BatchNorm groups in one pass, against the author's model on one after the other."""
    group = rows(call.labels) // 2
    call = call.part(0, 2 * group)
    perturbed = probe.in_groups(build, call.perturbed(), group)
    try:
        found = probe.VirtualModel(build(), recipe.seed, seen.calls, dtype, device).look(call, group)
    except RunError as problem:
        return Check("groups", False, str(problem))
    own = probe.in_groups(build, call, group)
    wrong = probe.difference(own, {k: v for k, v in found.items() if k in own}, perturbed)
    advice = "samples of two groups meet outside BatchNorm: set machine.workers_per_pass = 1 and leave bn_group out"
    return Check("groups", not wrong, f"{wrong}; {advice}" if wrong else "two groups in a pass do not meet")


# ---------------------------------------------------------------- on the replica, over ranks


def after(
    replica: Replica,
    recipe,
    point: Point,
    worker_batches: Mapping[int, Batch],
    begun: dict | None,
    weights: str | None = None,
):
    """Checks on this rank's replica at its starting weights; collective.

    worker_batches: batches of workers 0 and 1 of the first step (0 alone where there is one), decoded by this rank.
    begun: the facts of the run's first start, at a resume. weights: SHA-256 of the author's model. Returns (checks,
    facts of this start); both equal on all ranks.
    """
    engine = replica.engine
    bench = Bench(replica, recipe, point)
    facts = facts_of_rank(replica)
    shares = {worker: bench.share({worker: batch}) for worker, batch in worker_batches.items()}
    facts["batch"] = digest(parts_of(worker_batches[0]))
    gradients = bench.gradients(0, worker_batches[0])
    facts["gradient"] = digest(gradients)
    wrong = None
    if not isinstance(replica.optimizer, Optimizer):
        names = (name for name, _ in replica.buckets.places)
        trial = (recipe.optim, replica.optimizer.named, dict(zip(names, gradients, strict=True)))
        wrong, updated = together(engine, lambda: own_optim.trial(*trial))
        facts["update"] = digest(updated)
    everyone = engine.gather(facts)
    checks = []
    if weights and everyone[0]["weights"] != weights:
        checks.append(Check("model", False, "its starting weights in buckets are not those that its author gave it"))
    if "update" in facts:
        wrong = next((w for w in engine.gather(wrong) if w), None)
        what = f"{recipe.optim.name} goes on from its state to the bit"
        checks.append(Check("optimizer", not wrong, f"optim.name = {recipe.optim.name}: {wrong}" if wrong else what))
    if len(worker_batches) > 1:
        checks.append(check_workers(bench, worker_batches, shares))
    if recipe.determinism == "any-ranks":
        checks.append(check_ranks(everyone, begun))
    replica.buckets.clear()
    return checks, everyone[0]


class Bench:
    """A replica's gradients, taken apart by worker: what a step sums, before it is summed over ranks."""

    def __init__(self, replica: Replica, recipe, point: Point):
        self.replica, self.point, self.group = replica, point, recipe.batch.group
        self.loss, self.workers_per_pass = loss_function(recipe.train), recipe.machine.workers_per_pass

    def share(self, batches: Mapping[int, Batch]) -> list[torch.Tensor]:
        """What these workers add to a step's sums: int64 under any-ranks, else floating."""
        return self._run([{worker: batch} for worker, batch in batches.items()])

    def share_in_one_pass(self, batches: Mapping[int, Batch]) -> list[torch.Tensor]:
        """The same, in one pass."""
        return self._run([batches])

    def gradients(self, worker: int, batch: Batch) -> list[torch.Tensor]:
        """A worker's gradients as computed, by name: whatever the buckets and the fixed point."""
        fixed, self.replica.buckets.fixed = self.replica.buckets.fixed, None
        try:
            self._run([{worker: batch}])
            return [place.clone() for _, place in self.replica.buckets.places]
        finally:
            self.replica.buckets.fixed = fixed

    def _run(self, passes: list[Mapping[int, Batch]]) -> list[torch.Tensor]:
        replica, point = self.replica, self.point
        replica.train()
        replica.buckets.begin(point.workers)
        for batches in passes:
            replica.begin_pass(point.step, list(batches), [rows(labels) for _, labels, *_ in batches.values()])
            replica.buckets.arm(last_pass=False)
            inputs = joined([inputs for inputs, *_ in batches.values()])
            labels = joined([labels for _, labels, *_ in batches.values()])
            loss = self.loss(replica.forward(inputs, groups_in_step(point, self.group)), labels)
            replica.share(loss, rows(labels), point).backward()
            replica.buckets.end_pass()
            replica.end_pass()
        return [t.clone() for t in replica.buckets.local_sums()]


def parts_of(batch: Batch) -> list[torch.Tensor]:
    """What a model and a loss get of it."""
    inputs, labels, *_ = batch
    return [*tensors(inputs), *tensors(labels)]


def check_data(first: Batch, again: Batch, engine) -> Check:
    """Worker 0's batch, decoded twice on this rank."""
    same = all(torch.equal(a, b) or (a.is_floating_point() and torch.equal(a.nan_to_num(), b.nan_to_num()))
               for a, b in zip(parts_of(first), parts_of(again), strict=True))  # fmt: skip
    wrong = [rank for rank, equal in enumerate(engine.gather(same)) if not equal]
    if wrong:
        return Check(
            "data",
            False,
            f"decoded twice, worker 0's samples are others each time (rank {wrong[0]}): what is random in a data set "
            "must come from the generator that sample(index, rng) is given",
        )
    return Check("data", True, "decoded twice, a sample is the same")


def check_workers(bench: Bench, batches: Mapping[int, Batch], apart: Mapping[int, list[torch.Tensor]]) -> Check:
    """Workers 0 and 1 apart, both in one step, and each on another rank."""
    engine = bench.replica.engine
    both = bench.share(batches)
    wrong = unequal([a + b for a, b in zip(apart[0], apart[1], strict=True)], both)
    if not wrong and bench.workers_per_pass > 1:
        wrong = unequal(bench.share_in_one_pass(batches), both)
        wrong = wrong and f"in one pass (machine.workers_per_pass = {bench.workers_per_pass}): {wrong}"
    if engine.size > 1:  # all ranks take part, whatever they found
        mine = apart.get(engine.rank) or [torch.zeros_like(t) for t in both]
        handles = [engine.start_sum(t, f"preflight.{i}") for i, t in enumerate(mine)]
        for handle in handles:
            engine.wait(handle)
        over = unequal(mine, both)
        wrong = wrong or (over and f"over ranks 0 and 1: {over}")
    problems = [p for p in engine.gather(wrong and f"rank {engine.rank} on {socket.gethostname()}: {wrong}") if p]
    if problems:
        return Check("workers", False, f"workers 0 and 1 apart are not both together: {problems[0]}")
    where = "here and over two ranks" if engine.size > 1 else "on one rank"
    exact = "to the bit" if not both[0].is_floating_point() else "within rounding"
    return Check("workers", True, f"two workers add up {exact}, {where}")


def unequal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> str | None:
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        if not a.is_floating_point():
            wrong = int((a != b).sum())
            if wrong:
                return f"{wrong} of {a.numel()} sums in bucket {i} have other bits (a model that draws by itself?)"
            continue
        worst, largest = (a - b).abs().max().item(), b.abs().max().item()
        if not worst <= (1e-9 if a.dtype == torch.float64 else 1e-4) * largest + 1e-30:
            return f"sums in bucket {i} differ by {worst:.2g} of {largest:.2g} (a model that draws by itself?)"
    return None


def facts_of_rank(replica: Replica) -> dict:
    """What decides a rank's bits."""
    return {
        "host": socket.gethostname(),
        "weights": weights_sha256(replica.model),
        "device": replica.device.type if replica.device.type == "cpu" else torch.cuda.get_device_name(replica.device),
        "threads": torch.get_num_threads() if replica.device.type == "cpu" else 0,
        "cpu": f"{worlds.cpu_model()}, {torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
    }


# What is compared, in this order: the first that differs is the reason for those after it
COMPARED = {
    "weights": "its starting weights are others: the model's initial values must come from torch's generator",
    "threads": "it computes with another number of threads",
    "torch": "it has another torch",
    "batch": "it decodes worker 0's samples to other pixels (another decoder or library)",
    "gradient": "it computes another gradient from the same batch (other kernels, instruction set or library)",
    "update": "its optimizer makes another step of the same gradient (other code, or a draw of its own)",
}


def check_ranks(everyone: list[dict], begun: dict | None) -> Check:
    for key, meaning in COMPARED.items():
        common = Counter(facts.get(key) for facts in everyone).most_common(1)[0][0]
        other = [rank for rank, facts in enumerate(everyone) if facts.get(key) != common]
        if other:
            facts = everyone[other[0]]
            named = ", ".join(f"{rank} on {everyone[rank]['host']}" for rank in other[:8])
            more = f" and {len(other) - 8} more" if len(other) > 8 else ""
            return Check(
                "ranks",
                False,
                f"rank {named}{more}: {meaning}; {key} {shown(facts[key])}, others {shown(common)} ({facts['cpu']})",
            )
    now = everyone[0]
    for key in ("weights", "batch", "gradient", "update"):
        if begun and begun.get(key, now.get(key)) != now.get(key):
            return Check(
                "ranks",
                False,
                f"since the run's first start, {key} has other bits here: it was begun on {begun['device']} "
                f"({begun['cpu']}, torch {begun['torch']}), and this is {now['device']} ({now['cpu']}, torch "
                f"{now['torch']}). The run would no longer be the recipe's to the bit; train.preflight = false goes on",
            )
    since = ", as at the first start" if begun else ""
    return Check("ranks", True, f"{len(everyone)} computed worker 0 to the same bits{since}")


def shown(value) -> str:
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)


def digest(tensors: Sequence[torch.Tensor]) -> str:
    """SHA-256 of tensors' bytes."""
    found = hashlib.sha256()
    for tensor in tensors:
        value = tensor.detach().cpu().contiguous()
        found.update(value.view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return found.hexdigest()

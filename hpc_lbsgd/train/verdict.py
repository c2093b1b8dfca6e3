"""Steps that were not taken: what to say of them, and whether a run may go on."""

from __future__ import annotations

from collections.abc import Sequence

from hpc_lbsgd.theory.schedule import Point
from hpc_lbsgd.train.step import Outcome

# Shares of gradients that fixed point or a float16 wire makes zero: from where it is said, from where none is begun
FLUSHED_WARN, FLUSHED_STOP = 0.01, 0.5


def may_skip(train, step: int, skipped: Sequence[int]) -> bool:
    """Whether a bad step is skipped (`train.on_bad_step`), after those before it."""
    return train.on_bad_step == "skip" and in_a_row(step, skipped) < train.bad_steps_limit


def in_a_row(step: int, skipped: Sequence[int]) -> int:
    """How many steps just before `step` were skipped."""
    known, count = set(skipped), 0
    while step - count - 1 in known:
        count += 1
    return count


def bad_step(recipe, point: Point, outcome: Outcome, skipped: Sequence[int], hosts: Sequence[str], good: str) -> str:
    """Why a run ends at a step that is not finite or out of range. good: about the last good checkpoint."""
    before = in_a_row(point.step, skipped)
    more = f"; {before} steps before it were skipped (train.bad_steps_limit)" if before else ""
    return (
        f"step {point.step} (epoch {point.epoch + 1}): {where(recipe, outcome, hosts)}{more}. The step was not taken; "
        f"{good}. {advice(recipe, point, outcome)}"
    )


def where(recipe, outcome: Outcome, hosts: Sequence[str]) -> str:
    """What was wrong, and on which ranks."""
    if not outcome.bad_ranks:
        return "the sum of gradients over ranks is not finite (each rank's loss was)"
    what = "loss or gradient is not finite"
    if recipe.determinism == "any-ranks":
        what += f", or beyond the range of fixed_point_bits = {recipe.fixed_point_bits}"
    if outcome.bad_ranks == 1:
        return f"{what}, on rank {outcome.bad_rank} on {hosts[outcome.bad_rank]}"
    return f"{what}, on {outcome.bad_ranks} ranks"


def advice(recipe, point: Point, outcome: Outcome) -> str:
    if recipe.wire == "fp16" and not outcome.bad_ranks:
        return (
            "Gradients times 2^wire_scale_bits leave float16's range (65504): lower wire_scale_bits "
            f"(now {recipe.wire_scale_bits}), or set wire = fp32"
        )
    lower = f"Try a lower optim.base_lr (learning rate now {point.lr:g}) or a longer schedule.warmup_epochs"
    if recipe.determinism == "any-ranks":
        lower += "; or, where gradients and BatchNorm's statistics are finite but large, a lower fixed_point_bits"
    return lower


def unit(recipe, step: int) -> tuple[str, int | str]:
    """The key, and its value, that says how small a gradient may be."""
    key = "fixed_point_bits" if recipe.determinism == "any-ranks" else "wire_scale_bits"
    if recipe.fixed_point == "int32" and step:  # the first one is in int64
        key = "fixed_point"
    return key, getattr(recipe, key)


def lost(recipe, flushed: float) -> str:
    """Why a run is not begun whose gradients fixed point, or a float16 wire, makes zero."""
    (key, bits), most = unit(recipe, 0), 52
    smallest, who = f"2^-{bits + 1}", "determinism any-ranks"
    if key == "wire_scale_bits":
        smallest, who, most = f"2^-{bits + 25}", "wire fp16", 24  # half of float16's smallest, 2^-24
    other = ", or set wire = fp32" if key == "wire_scale_bits" else ""
    return (
        f"step 0: {flushed:.0%} of the gradients that are not zero are below {smallest}, and {who} makes them zero: "
        f"raise {key} (now {bits}, at most {most}), or scale the loss up and the learning rate down{other}"
    )

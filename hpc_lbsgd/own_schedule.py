"""A schedule of the user's own: `schedule.kind: package.module:function`.

The function is called with (workers, lr, momentum, epochs) - k, the scaled learning rate, and for how long - and
returns stages, as those by paper do (theory/schedule.py). Warm-up and the tail of an epoch stay the recipe's.
"""

from __future__ import annotations

import math

from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.imports import load, place_of
from hpc_lbsgd.theory.schedule import Stage

LOOKS = 64  # at a stage's shape, over its epochs


def stages(name: str, workers: int, lr: float, momentum: float, epochs: int) -> list[Stage]:
    """What the function returns, looked at. Raises RequestError for what makes no schedule, or two in two calls."""
    make, what = load(name, "schedule.kind"), f"schedule.kind = {name}"
    try:
        found, again = (list(make(workers, lr, momentum, epochs)) for _ in range(2))
        _check(found, epochs, what)
        ends = [*(s.first_epoch for s in found[1:]), epochs]
        looks = [[s.first_epoch + i * (e - s.first_epoch) / LOOKS for i in range(LOOKS)]
                 for s, e in zip(found, ends, strict=True)]  # fmt: skip
        once = [[_rate(stage, at, what) for at in looks] for stage, looks in zip(found, looks, strict=True)]
        twice = [[_rate(stage, at, what) for at in reversed(looks)] for stage, looks in zip(again, looks, strict=False)]
    except RequestError:
        raise
    except Exception as problem:  # anyone's code
        raise RequestError(f"{what}: {type(problem).__name__}: {problem}{place_of(problem)}") from None
    plain = [[(s.first_epoch, s.workers, s.lr, s.momentum) for s in stages] for stages in (found, again)]
    if plain[0] != plain[1] or once != [rates[::-1] for rates in twice]:
        raise RequestError(
            f"{what}: called twice, it gave two schedules; it must be a function of what it is called with, for every "
            "rank and each resume call it again"
        )
    return found


def _check(found: list[Stage], epochs: int, what: str) -> None:
    """Raise RequestError for stages that do not follow one another, or numbers that no run can have."""
    odd = next((s for s in found if not isinstance(s, Stage)), None)
    if odd is not None or not found:
        got = "nothing" if odd is None else type(odd).__name__
        raise RequestError(f"{what}: must return hpc_lbsgd.Stage objects, and returned {got}")
    starts = [s.first_epoch for s in found]
    if starts[0] != 0 or starts != sorted(set(starts)) or any(type(e) is not int or e >= epochs for e in starts):
        raise RequestError(f"{what}: stages begin at epochs {starts}; they must rise from 0 and stay below {epochs}")
    for s in found:
        if type(s.workers) is not int or s.workers < 1:
            raise RequestError(f"{what}: workers = {s.workers!r} from epoch {s.first_epoch} on; at least 1, whole")
        if not (math.isfinite(s.lr) and s.lr > 0 and 0 <= s.momentum < 1):
            raise RequestError(
                f"{what}: lr = {s.lr}, momentum = {s.momentum} from epoch {s.first_epoch} on; above 0; 0 to below 1"
            )
        if not callable(s.shape) and s.shape not in ("constant", "cosine", "polynomial"):
            raise RequestError(f"{what}: shape = {s.shape!r}; constant, cosine, polynomial, or a function of the epoch")


def _rate(stage: Stage, epoch: float, what: str) -> float:
    if not callable(stage.shape):
        return 1.0
    share = float(stage.shape(epoch))
    if not (math.isfinite(share) and share >= 0):
        raise RequestError(f"{what}: {share} of the learning rate at epoch {epoch:g}; at least 0")
    return share

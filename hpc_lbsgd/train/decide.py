"""What a run decides from what it measured. Pure in (recipe, step, measurements), which every rank has."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hpc_lbsgd.recipe import Decision
from hpc_lbsgd.theory import noise
from hpc_lbsgd.theory.schedule import Schedule


def noise_scale(recipe, measurements: Sequence[noise.Measurement]) -> noise.NoiseScale | None:
    """The noise scale of the last `train.noise_scale_window` measurements."""
    return noise.noise_scale(measurements[-recipe.train.noise_scale_window :])


def is_best(score: float, best: float | None) -> bool:
    """Whether an evaluation is the best so far; one that is no number never is."""
    return not math.isnan(score) and (best is None or math.isnan(best) or score > best)


def batch_from(recipe, schedule: Schedule, epoch: int, measured: noise.NoiseScale | None) -> Decision | None:
    """Adaptive batch: workers and learning rate from `epoch` on (McCandlish et al. 2018, eq. D.6); None: as before."""
    if epoch < schedule.warmup.epochs or measured is None or measured.value is None:
        return None
    section, n, now = recipe.schedule, recipe.batch.samples_per_worker, schedule.stages[-1]
    largest = recipe.max_workers() or schedule.samples // n
    if recipe.batch.last_batch == "drop":  # a batch larger than the data would leave no step
        largest = min(largest, schedule.samples // n)
    wanted = round(noise.adaptive_batch(measured.value, section.noise_factor) / n)
    workers = min(max(wanted, recipe.batch.workers), largest)
    if workers == now.workers:
        return None
    lr = {
        "keep": now.lr,
        "linear": now.lr * workers / now.workers,
        "noise": noise.transferred_lr(now.lr, now.workers * n, workers * n, measured.value),
    }[section.lr_on_batch_change]
    return Decision(epoch, workers, lr)

"""How learning rate, batch and noise go together (Goyal et al. 2017, Smith et al. 2018)."""

from __future__ import annotations

import math


def scaled_lr(base_lr: float, base_batch: int, global_batch: int, rule: str = "linear") -> float:
    """Learning rate for a global batch of kn samples, from one that is right at `base_batch`.

    linear  base_lr * kn / base_batch        Goyal et al. 2017, section 2.1 (linear scaling rule)
    sqrt    base_lr * sqrt(kn / base_batch)  the rule Goyal's Table 2a compares against
    none    base_lr
    """
    if rule == "linear":
        return base_lr * global_batch / base_batch
    if rule == "sqrt":
        return base_lr * math.sqrt(global_batch / base_batch)
    if rule == "none":
        return base_lr
    raise ValueError(f"scaling rule {rule!r}: linear, sqrt or none")


def noise_scale(lr: float, momentum: float, global_batch: int, samples: int) -> float:
    """SGD's noise scale g = eps*N / (B(1-m)) (Smith et al. 2018; N >> B)."""
    return lr * samples / (global_batch * (1 - momentum))


def noise_scale_exact(lr: float, momentum: float, global_batch: int, samples: int) -> float:
    """g = eps/(1-m) * (N/B - 1) (Smith et al. 2018), before N >> B is assumed."""
    return lr / (1 - momentum) * (samples / global_batch - 1)


def accumulator_warmin_epochs(global_batch: int, samples: int, momentum: float) -> float:
    """Epochs until momentum's accumulator has filled from zero: B / (N(1-m)) (Smith et al. 2018)."""
    return global_batch / (samples * (1 - momentum))


def required_gbit_per_s(gradient_bytes: int, backward_s: float) -> float:
    """Bandwidth that hides an allreduce behind backward: 2*bytes/time (Goyal et al. 2017, section 4).

    An allreduce sends and receives about twice the gradient; Goyal's check is 100 MB in 0.125 s: 12.8 Gbit/s.
    """
    return 2 * gradient_bytes * 8 / backward_s / 1e9

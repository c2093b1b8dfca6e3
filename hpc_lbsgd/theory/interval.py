"""How often to save (Young 1974, Daly 2006)."""

from __future__ import annotations

import math


def checkpoint_interval_s(cost_s: float, mtbf_s: float) -> float:
    """Seconds between checkpoints that lose least: sqrt(2 * C * M), and M where that would be longer.

    cost_s: C, what one checkpoint holds the job up. mtbf_s: M, mean time between failures of the job. Both in seconds;
    raises ValueError where C is negative or M not above zero. J. W. Young, A first order approximation to the optimum
    checkpoint interval, CACM 17(9), 1974; J. T. Daly, A higher order estimate of the optimum checkpoint interval for
    restart dumps, FGCS 22(3), 2006, whose further terms vanish with C/M, and who takes M where C >= 2M.
    """
    if cost_s < 0 or mtbf_s <= 0:
        raise ValueError(f"cost {cost_s} s, time between failures {mtbf_s} s: at least 0, and above 0")
    return min(math.sqrt(2 * cost_s * mtbf_s), mtbf_s)


def job_mtbf_s(node_mtbf_hours: float, nodes: int) -> float:
    """Seconds between failures of a job that any of its nodes ends: their rates add."""
    return 3600 * node_mtbf_hours / nodes

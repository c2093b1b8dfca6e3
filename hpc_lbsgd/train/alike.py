"""Ranks of one job must be alike: the same program, libraries, recipe and data, clocks that agree. A stale copy of the
program on one node, or a data set that was copied there before it changed, otherwise trains something nobody asked for.
"""

from __future__ import annotations

import locale
import platform
import socket
import sys
import time
from collections import Counter
from collections.abc import Sequence

import numpy
import torch

import hpc_lbsgd
from hpc_lbsgd import origin
from hpc_lbsgd.errors import RequestError

CLOCKS_APART_S = 60.0  # nodes keep time to a millisecond; a minute is a clock that nobody sets


def software() -> dict[str, str]:
    return {
        "hpc_lbsgd": f"{hpc_lbsgd.__version__} ({origin.program()})",
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
    }


def facts(recipe) -> dict[str, str]:
    """What must be the same on all ranks, by what a person calls it."""
    return {
        **software(),
        "recipe": recipe.fingerprint()[:16],
        "encoding of names (locale)": f"{sys.getfilesystemencoding()}, {locale.getpreferredencoding(False)}",
    }


def refuse_unlike(engine, recipe) -> None:
    """Raise RequestError on all ranks where one of them is not as the others, naming it. Collective."""
    hosts, mine = engine.gather(socket.gethostname()), facts(recipe)
    refuse_other(engine.gather(mine), hosts)
    engine.barrier()  # ranks come minutes apart, and their clocks are to be compared at one time
    refuse_clocks(engine.gather(time.time()), hosts)


def refuse_other(found: Sequence[dict[str, str]], hosts: Sequence[str], hint: str = "") -> None:
    """found: facts by rank."""
    for what in found[0]:
        values = [facts[what] for facts in found]
        common = Counter(values).most_common(1)[0][0]
        odd = next((rank for rank, value in enumerate(values) if value != common), None)
        if odd is not None:
            more = sum(value != common for value in values) - 1
            raise RequestError(
                f"ranks are not alike: rank {odd} on {hosts[odd]} has {what} {values[odd]}, most have {common}"
                + (f" (and {more} more ranks)" if more else "")
                + (hint or "; start all ranks with one environment, one recipe and the same settings")
            )


def refuse_clocks(times: Sequence[float], hosts: Sequence[str]) -> None:
    """times: of all ranks at about the same moment, seconds."""
    middle = sorted(times)[len(times) // 2]
    odd = max(range(len(times)), key=lambda rank: abs(times[rank] - middle))
    if abs(times[odd] - middle) > CLOCKS_APART_S:
        raise RequestError(
            f"ranks are not alike: the clock of rank {odd} on {hosts[odd]} is {times[odd] - middle:+.0f} s off the "
            "others'; have that node's time set (NTP), or start without it"
        )

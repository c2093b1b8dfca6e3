"""One verdict for all ranks, so that none goes on alone and none waits for one that left."""

from __future__ import annotations

import socket
from collections.abc import Callable

from hpc_lbsgd.errors import RequestError


def agree(engine, work: Callable):
    """Rank 0's result of `work` on every rank; if it raises RequestError there, every rank does."""
    verdict = None
    if engine.rank == 0:
        try:
            verdict = ("ok", work())
        except RequestError as problem:
            verdict = ("refused", str(problem))
    kind, value = engine.share(verdict)
    if kind == "refused":
        raise RequestError(value)
    return value


def together(engine, work: Callable):
    """Each rank's own result of `work`; if it raises RequestError on some of them, all ranks raise it and name one."""
    result = problem = None
    try:
        result = work()
    except RequestError as found:
        problem = f"rank {engine.rank} on {socket.gethostname()}: {found}" if engine.rank else str(found)
    problems = [p for p in engine.gather(problem) if p]
    if problems:
        raise RequestError(problems[0] + (f" (and {len(problems) - 1} more ranks)" if len(problems) > 1 else ""))
    return result

"""Start the ranks of a check with this environment's mpirun, and read what rank 0 found."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence

from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.parallel.launchers import Layout, check_hosts, compose, exported, slots_of, started_by_srun
from hpc_lbsgd.parallel.refusals import refusal
from hpc_lbsgd.progress import running
from hpc_lbsgd.schedulers import known

TIMEOUT_S = 120
MARK = "check: "  # before rank 0's facts, among what launchers print


def say(facts: dict) -> None:
    """Rank 0's facts, for `measure`."""
    print(MARK + json.dumps(facts), flush=True)


def measure(module: str, hosts: str | None, ranks_per_node: int, words: Sequence[str] = ()) -> dict:
    """Start a check's ranks; returns rank 0's facts, or {"problem": what went wrong}.

    module: run by each rank, with `words`; its rank 0 calls `say`. hosts: "a,b"; default: the nodes of the batch job,
    or this machine; where srun starts ranks, it knows them.
    """
    names = [slots_of(h)[0] for h in hosts.split(",")] if hosts else known.hosts()
    slots = ",".join(f"{name}:{ranks_per_node}" for name in names) or None
    ranks = ranks_per_node * max(1, len(names))
    layout = Layout(ranks) if started_by_srun() else Layout(ranks, slots, oversubscribe=not slots)
    try:
        if slots:
            check_hosts(slots, ranks)
        line = compose(layout, exported(layout), [sys.executable, "-m", module, *words])
    except RequestError as problem:
        return {"problem": str(problem)}
    return run(line, layout)


def run(line: list[str], layout: Layout) -> dict:
    """Rank 0's facts, or a problem. The launcher need not end in time once the facts are there."""
    running(line)
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=errors, text=True)
        killer = threading.Timer(TIMEOUT_S, process.kill)
        killer.start()
        found, said = None, ""
        for text in process.stdout:
            said += text
            if text.startswith(MARK):
                found = json.loads(text.removeprefix(MARK))
                break
        if found:
            process.terminate()  # it has nothing left to do, and Open MPI 5 may miss that
        code = process.wait()
        late = not killer.is_alive()
        killer.cancel()
        if found:
            return found
        if late:
            return {"problem": f"{layout.ranks} ranks did not end within {TIMEOUT_S} s: they cannot reach each other"}
        errors.seek(0)
        said += errors.read()
        last = (said.strip() or "nothing").splitlines()[-1]
        return {"problem": refusal(said, layout) or f"mpirun ended with {code}, saying last: {last}"}

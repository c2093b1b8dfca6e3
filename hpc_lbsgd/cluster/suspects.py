"""Hosts that a batch script goes on without, by what the ranks left on record."""

from __future__ import annotations

import os

from hpc_lbsgd.records import RunFolder, read_metrics


def suspects(run: str | os.PathLike) -> list[str]:
    """Hosts whose ranks hung at the end of the run's last start (the watchdog named them), or were slow in it and had
    not become as fast as the others again. Without their domain."""
    folder = RunFolder(run)
    found = set((folder.status() or {}).get("stalest_hosts") or [])
    slow: dict[int | None, str] = {}
    for record in read_metrics(folder.metrics):
        if record["kind"] == "start":
            slow = {}
        elif record.get("event") == "slow":
            slow[record.get("rank")] = str(record.get("host"))
        elif record.get("event") == "slow-ended":
            slow.pop(record.get("rank"), None)
    return sorted({host.partition(".")[0] for host in (*found, *slow.values())})

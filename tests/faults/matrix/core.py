"""Rows, their injections, and the JSON lines that are written of them."""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass
class Injection:
    """One fault that was injected, and what came of it."""

    moment: str  # where and when
    detected: str  # by what; "" where nothing had to be
    seconds: float | None = None  # from the fault to its end on record
    lost: int | None = None  # steps that a resume did again
    said: str = ""  # the one line that the user saw


@dataclass(frozen=True)
class Row:
    """`run(rng, folder)` yields an Injection each time a fault was injected and all that must hold held. It raises
    AssertionError where something did not."""

    name: str
    fault: str
    must: str
    count: int  # of the long version
    run: Callable[[random.Random, Path], Iterator[Injection]]
    ranks: bool = False  # real ranks
    group: str = ""  # of the page's table


@dataclass
class Tally:
    done: int = 0
    failed: int = 0
    seconds: float = 0.0
    seeds: set[int] = field(default_factory=set)


def read(path: Path) -> list[dict]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def run(row: Row, seed: int, count: int, out: Path, again: bool) -> Tally:
    """Inject until `count` faults of this row are on record, from `seed` on; those of earlier calls count, unless
    `again`. A seed is a chain of injections: the same seed is the same chain."""
    known = [] if again else [r for r in read(out) if r["row"] == row.name and r["seed"] >= seed]
    tally = Tally(done=len(known), seeds={r["seed"] for r in known})
    number, barren = seed, 0
    while tally.done < count and barren < 3:
        if number not in tally.seeds:
            before = tally.done
            _run_seed(row, number, count, out, tally)
            barren = 0 if tally.done > before else barren + 1
        number += 1
    return tally


def _run_seed(row: Row, seed: int, count: int, out: Path, tally: Tally) -> None:
    folder = Path(tempfile.mkdtemp(prefix=f"faults-{row.name}-{seed}-"))
    begun, index = time.monotonic(), 0
    rng = random.Random(f"{row.name} {seed}")
    try:
        for found in row.run(rng, folder):
            _write(out, row, seed, index, asdict(found), "held")
            index += 1
            tally.done += 1
            if tally.done >= count and not row.ranks:
                break
    except Exception as problem:  # whatever it is: something did not hold, or could not be looked at
        said = str(problem) if isinstance(problem, AssertionError) else traceback.format_exc()
        _write(out, row, seed, index, asdict(Injection("", "")), f"FAILED: {said[-3000:]}")
        print(f"{row.name} seed {seed} injection {index}: {said[-3000:]}", file=sys.stderr, flush=True)
        tally.failed += 1
        tally.done += 1
    else:
        shutil.rmtree(folder, ignore_errors=True)
    tally.seeds.add(seed)
    tally.seconds += time.monotonic() - begun


def _write(out: Path, row: Row, seed: int, index: int, facts: dict, verdict: str) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "a") as f:
        f.write(json.dumps({"row": row.name, "seed": seed, "index": index, **facts, "verdict": verdict}) + "\n")


def hold(what: bool, *said: object) -> None:
    """An assertion that also holds under `python -O`, and says what was seen."""
    if not what:
        raise AssertionError("\n".join(str(s) for s in said))


def one_line(text: str) -> str:
    """What the user saw: the first line that the product said last about it."""
    lines = [line for line in text.splitlines() if line.startswith("hpc-lbsgd: ")]
    return lines[0].removeprefix("hpc-lbsgd: ")[:300] if lines else ""

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

import pytest


@dataclass
class Injection:
    """One fault that was injected, and what came of it."""

    moment: str  # where and when
    detected: str  # by what; "" where nothing had to be
    seconds: float | None = None  # from the fault to its end on record
    lost: int | None = None  # steps that a resume did again
    said: str = ""  # the one line that the user saw
    cases: int = 1  # of fuzz: files


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
    cost_s: float = 0.05  # an injection, on two quiet cores; what is on record says it better
    why_not: Callable[[], str | None] = lambda: None  # the reason why it cannot run here


@dataclass
class Tally:
    """What is on record of a row."""

    done: int = 0
    failed: int = 0
    seconds: float = 0.0
    seeds: set[int] = field(default_factory=set)

    def add(self, records: list[dict]) -> None:
        self.done += sum(r["cases"] for r in records)
        self.failed += sum(r["verdict"] != "held" for r in records)
        self.seconds += sum(r["cost_s"] for r in records)
        self.seeds |= {r["seed"] for r in records}

    def left_s(self, row: Row, count: int) -> float:
        """Until `count` injections are on record."""
        each = self.seconds / self.done if self.done else row.cost_s
        return max(count - self.done, 0) * each


def read(path: Path) -> list[dict]:
    """A line that a kill cut short is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def on_record(row: Row, seed: int, records: list[dict]) -> Tally:
    tally = Tally()
    tally.add([r for r in records if r["row"] == row.name and r["seed"] >= seed])
    return tally


def run(row: Row, tally: Tally, seed: int, count: int, out: Path, after: Callable[[int], bool]) -> None:
    """Inject until `count` faults of this row are on record, from `seed` on. A seed is a chain of injections, and the
    same chain again; it is on record as a whole, or, where it was interrupted, not at all. after(seed): called then;
    False: no more now."""
    number, barren = seed, 0
    while tally.done < count and barren < 3:
        if number not in tally.seeds:
            found = chain(row, number)
            append(out, found)
            tally.add(found)
            tally.seeds.add(number)
            barren = 0 if found else barren + 1
            if not after(number):
                return
        number += 1


def chain(row: Row, seed: int) -> list[dict]:
    """The records of one seed."""
    folder = Path(tempfile.mkdtemp(prefix=f"faults-{row.name}-{seed}-"))
    found: list[tuple[Injection, str]] = []
    begun = time.monotonic()
    try:
        for injection in row.run(random.Random(f"{row.name} {seed}"), folder):
            found.append((injection, "held"))
    except (
        Exception,
        pytest.fail.Exception,
    ) as problem:  # something did not hold, or could not be looked at
        said = str(problem) if isinstance(problem, AssertionError) else traceback.format_exc()
        print(f"{row.name} seed {seed} injection {len(found)}: {said[-3000:]}", file=sys.stderr, flush=True)
        found.append((Injection("", ""), f"FAILED: {said[-3000:]}"))
    else:
        shutil.rmtree(folder, ignore_errors=True)
    cost_s = round((time.monotonic() - begun) / len(found), 4) if found else 0.0
    return [
        {"row": row.name, "seed": seed, "index": index, **asdict(injection), "cost_s": cost_s, "verdict": verdict}
        for index, (injection, verdict) in enumerate(found)
    ]


def append(out: Path, records: list[dict]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "a") as f:
        f.write("".join(json.dumps(record) + "\n" for record in records))


def hold(what: bool, *said: object) -> None:
    """An assertion that also holds under `python -O`, and says what was seen."""
    if not what:
        raise AssertionError("\n".join(str(s) for s in said))


def one_line(text: str) -> str:
    """What the user saw: the first line that the product said last about it."""
    lines = [line for line in text.splitlines() if line.startswith("hpc-lbsgd: ")]
    return lines[0].removeprefix("hpc-lbsgd: ")[:300] if lines else ""

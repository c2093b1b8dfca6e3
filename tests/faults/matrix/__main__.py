"""Run the fault matrix, or rows of it."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""
if os.geteuid() == 0:  # Open MPI refuses root; containers have no other user
    os.environ.setdefault("OMPI_ALLOW_RUN_AS_ROOT", "1")
    os.environ.setdefault("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1]), str(HERE.parents[2])]

import core  # noqa: E402
import forked  # noqa: E402
import spaces  # noqa: E402
import table  # noqa: E402

from hpc_lbsgd.train.display import duration  # noqa: E402

OUT = Path("runs/faults/injections.jsonl")


def main() -> int:
    parser = argparse.ArgumentParser(prog="make faults")
    parser.add_argument("--part", default="", help="rows whose names begin so, A,B for several; empty: all")
    parser.add_argument("--seed", type=int, default=0, help="the first chain's")
    parser.add_argument("--count", type=int, default=None, help="injections a row; default: each row's own")
    parser.add_argument("--minutes", type=float, default=None, help="begin no chain after so long")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--again", action="store_true", help="do not count what is on record")
    parser.add_argument("--page", type=Path, default=None, help="write the table there and do nothing else")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    rows = [row for row in table.ROWS if row.name.startswith(tuple(args.part.split(",")))]
    if args.page:
        import page

        args.page.write_text(page.render(table.ROWS, core.read(args.out)))
        return 0
    if not rows:
        print(f"no row is called {args.part}; there are: {', '.join(r.name for r in table.ROWS)}", file=sys.stderr)
        return 2
    if args.list:
        for row in rows:
            print(f"{row.name:20s} {row.count:6d} x {row.cost_s:g} s  {row.fault}")
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if not spaces.why_not():
        spaces.own_mounts()
    made = Slice(rows, args)
    try:
        made.run()
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    finally:
        forked.end_all()
        made.write()
    return 1 if made.failed else 0


class Slice:
    """One call: rows after each other, until all are on record or its time is over."""

    def __init__(self, rows: list[core.Row], args: argparse.Namespace):
        self.args, self.began, self.load = args, datetime.now(timezone.utc), [os.getloadavg()[0]]
        self.end = time.monotonic() + args.minutes * 60 if args.minutes else None
        known = [] if args.again or args.count is not None else core.read(args.out)
        self.rows = [(row, core.on_record(row, args.seed, known), args.count or row.count) for row in rows]
        self.before = sum(tally.done for _, tally, _ in self.rows)
        self.failed = 0

    @property
    def left_s(self) -> float:
        return sum(tally.left_s(row, count) for row, tally, count in self.rows if not row.why_not())

    @property
    def over(self) -> bool:
        return self.end is not None and time.monotonic() > self.end

    def run(self) -> None:
        print(f"from seed {self.args.seed} on; {self.before} injections on record; ETA {duration(self.left_s)}")
        for row, tally, count in self.rows:
            reason = row.why_not()
            print(f"{row.name:20s} {count:6d}  {row.fault}" + (f": not here, {reason}" if reason else ""), flush=True)
            failed, shown = tally.failed, time.monotonic()

            def after(seed: int, row=row, tally=tally, count=count) -> bool:
                nonlocal shown
                if time.monotonic() - shown > 10 or tally.done >= count or self.over:
                    shown = time.monotonic()
                    said = f"  {tally.done}/{count} on record, {tally.failed} failed, last seed {seed}"
                    print(f"{said}, {tally.seconds / tally.done:.2g} s each, ETA {duration(self.left_s)}", flush=True)
                return not self.over

            if not reason and not self.over:
                core.run(row, tally, self.args.seed, count, self.args.out, after)
            self.failed += tally.failed - failed

    def write(self) -> None:
        """That this call was made goes on record too."""
        done = sum(tally.done for _, tally, _ in self.rows) - self.before
        seconds = (datetime.now(timezone.utc) - self.began).total_seconds()
        made = {"row": "slice", "part": self.args.part, "seed": self.args.seed, "began": self.began.isoformat()[:16],
                "seconds": round(seconds), "load": [*self.load, os.getloadavg()[0]], "cores": os.cpu_count(),
                "injections": done}  # fmt: skip
        core.append(self.args.out, [made])


if __name__ == "__main__":
    sys.exit(main())

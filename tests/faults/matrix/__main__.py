"""Run rows of the fault matrix."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""
if os.geteuid() == 0:  # Open MPI refuses root; containers have no other user
    os.environ.setdefault("OMPI_ALLOW_RUN_AS_ROOT", "1")
    os.environ.setdefault("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2]), str(Path(__file__).parents[3])]

import core  # noqa: E402
import table  # noqa: E402

OUT = Path("runs/faults/injections.jsonl")


def main() -> int:
    parser = argparse.ArgumentParser(prog="make faults")
    parser.add_argument("--part", default="", help="rows whose names begin so; empty: all")
    parser.add_argument("--seed", type=int, default=0, help="the first chain's")
    parser.add_argument("--count", type=int, default=None, help="injections a row; default: each row's own")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--again", action="store_true", help="do not count what is on record")
    parser.add_argument("--page", type=Path, default=None, help="write the table there and do nothing else")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    if args.page:
        import page

        args.page.write_text(page.render(table.ROWS, core.read(args.out)))
        return 0
    rows = [row for row in table.ROWS if row.name.startswith(args.part)]
    if not rows:
        print(f"no row is called {args.part}; there are: {', '.join(r.name for r in table.ROWS)}", file=sys.stderr)
        return 2
    failed = 0
    for row in rows:
        count = row.count if args.count is None else args.count
        print(f"{row.name:24s} {count:6d}  {row.fault}", flush=True)
        if args.list:
            continue
        begun = time.monotonic()
        tally = core.run(row, args.seed, count, args.out, args.again or args.count is not None)
        failed += tally.failed
        seeds = f"seeds {min(tally.seeds)} to {max(tally.seeds)}" if tally.seeds else "no seed"
        print(f"  {tally.done} on record, {tally.failed} failed, {seeds}, {time.monotonic() - begun:.0f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""`make gpu-check`: what only a GPU can prove, in the order in which one would look. The first failure stops.

    python tests/gpu/check.py                     ten minutes on one GPU
    python tests/gpu/check.py --device cpu        the same script on the CPU, small: does it work itself?

Prints a page, and writes it with all measured values to gpu-check.json: send that file with a report.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
OK, FAILED, SKIPPED = "ok", "FAILED", "skipped"


class Line(NamedTuple):
    check: str
    result: str
    found: str
    seconds: float
    values: dict[str, Any]


def run(checks, bench, show=print) -> list[Line]:
    """Each check in turn, up to the first that fails. A check returns (one sentence, values) or raises."""
    from means import Skip

    lines = []
    for check in checks:
        name, started, values = check.__name__.replace("_", " "), time.monotonic(), {}
        try:
            found, values = check(bench)
            result = OK
        except Skip as why:
            result, found = SKIPPED, str(why)
        except AssertionError as problem:
            result, found = FAILED, str(problem) or traceback.format_exc().strip().splitlines()[-2].strip()
        except Exception as problem:  # whatever a new machine brings
            traceback.print_exc()
            result, found = FAILED, f"{type(problem).__name__}: {problem}"
        line = Line(name, result, found, round(time.monotonic() - started, 2), values)
        lines.append(line)
        show(f"{line.result:8}{line.check:24}{line.seconds:6.1f} s  {line.found}")
        if result == FAILED:
            break
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("gpu-check.json"), help="default: %(default)s")
    args = parser.parse_args()
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if os.geteuid() == 0:  # containers have no other user
        os.environ |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # before CUDA starts, as `train` sets it
    import checks
    import torch
    from means import Bench

    if args.device == "cuda" and not torch.cuda.is_available():
        print("gpu-check: torch sees no GPU here; --device cpu (make gpu-check DEVICE=cpu) tries the script itself")
        return 2
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        lines = run(checks.ALL, Bench(torch.device(args.device, 0 if args.device == "cuda" else None), folder))
    failed = [line for line in lines if line.result == FAILED]
    left = len(checks.ALL) - len(lines)
    about = {
        "device": torch.cuda.get_device_name(0) if args.device == "cuda" else f"cpu ({platform.machine()}): a dry run",
        "devices": torch.cuda.device_count(),
        "torch": torch.__version__,
        "passed": not failed,
        "not_run": left,
    }
    args.out.write_text(json.dumps(about | {"checks": [line._asdict() for line in lines]}, indent=1) + "\n")
    total = sum(line.seconds for line in lines)
    end = f"{failed[0].check} failed, {left} checks were not run" if failed else "all that could be checked holds"
    print(f"{about['device']}: {end}; {total:.0f} s; {args.out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""The fault matrix in short: rows with a fixed seed. All of it: make faults."""

import json
import subprocess
import sys

import pytest


@pytest.mark.parametrize("row, count", [("bits", 10), ("cut", 10), ("rank-dies", 3), ("slow-rank", 1), ("bad-step", 1)])
def test_a_row_holds(row, count, tmp_path):
    line = [
        sys.executable,
        "tests/faults/matrix",
        "--part",
        row,
        "--count",
        str(count),
        "--out",
        tmp_path / "out.jsonl",
    ]
    result = subprocess.run(list(map(str, line)), capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(found) >= count and {r["verdict"] for r in found} == {"held"}

"""`make gpu-check` itself, dry: a person with a GPU runs it once, and it must work then."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests" / "gpu"))


def test_all_of_it_runs_on_the_cpu(tmp_path):
    command = [sys.executable, ROOT / "tests" / "gpu" / "check.py", "--device", "cpu", "--out", tmp_path / "out.json"]
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    results = {line["check"]: line["result"] for line in found["checks"]}
    assert found["passed"] and found["not_run"] == 0 and "dry run" in found["device"]
    assert {name for name, r in results.items() if r != "ok"} == {
        "driver",
        "kernels",
        "sanitizer",
        "ranks",
        "bandwidth",
    }
    assert "all that could be checked holds" in result.stdout and len(result.stdout.splitlines()) < 30


def test_the_first_failure_stops_and_is_on_the_page():
    import check

    ran, said = [], []

    def good(bench):
        ran.append("good")
        return "fine", {"x": 1}

    def bad(bench):
        assert False, "2 levels apart"  # noqa: B011

    def broken(bench):
        ran.append("broken")

    lines = check.run([good, bad, broken], None, said.append)
    assert ran == ["good"] and [line.result for line in lines] == ["ok", "FAILED"]
    assert "2 levels apart" in said[1] and lines[0].values == {"x": 1}

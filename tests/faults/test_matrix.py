"""The fault matrix in short: rows with a fixed seed, several in one call. All of it: make faults."""

import json
import subprocess
import sys

import pytest

PARTS = {
    "bits,cut-metrics": 10,
    "fuzz": 100,
    "rank-dies,slow-rank,bad-step,save-ranks,images,stop-sigint-twice,stop-terminal,two-owners,cut-off": 1,
}


def matrix(*words):
    line = [sys.executable, "tests/faults/matrix", *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, timeout=400)


@pytest.mark.parametrize("part", PARTS)
def test_rows_hold(part, tmp_path):
    out = tmp_path / "out.jsonl"
    result = matrix("--part", part, "--count", PARTS[part], "--out", out)
    assert result.returncode == 0, result.stdout + result.stderr
    *found, made = [json.loads(line) for line in out.read_text().splitlines()]
    assert {r["verdict"] for r in found} == {"held"} and made["injections"] == sum(r["cases"] for r in found)
    skipped = result.stdout.count(": not here, ")  # a network namespace may not be permitted
    assert len({r["row"] for r in found}) + skipped >= len(part.split(","))
    # the page is made of that file, and the next call goes on after it
    page = tmp_path / "page.md"
    assert matrix("--page", page, "--out", out).returncode == 0
    injections = sum(not r["row"].startswith("fuzz") for r in found)
    assert f"{injections} injections" in page.read_text() and f"| `{found[0]['row']}` |" in page.read_text()


def test_it_goes_on_where_it_was_interrupted(tmp_path):
    out = tmp_path / "out.jsonl"
    for expected in (1, 2):  # chains of ten; no more is begun after no time at all
        assert matrix("--part", "bits-metrics", "--minutes", 0.0001, "--seed", 5, "--out", out).returncode == 0
        records = [json.loads(line) for line in out.read_text().splitlines()]
        assert {r["seed"] for r in records if r["row"] == "bits-metrics"} == set(range(5, 5 + expected))
    assert [r["seed"] for r in records if r["row"] == "slice"] == [5, 5]

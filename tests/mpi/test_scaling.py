"""`bench scaling` on real ranks. Seconds are not looked at."""

import json

from conftest import changed, command, mpirun, write_recipe


def test_bench_scaling(small_recipe, tmp_path):
    """Weak and strong on 1 and 2 ranks, the three rates together; then 3 ranks that something else has started add
    themselves to the report."""
    small = changed(small_recipe, batch__workers="per_rank", machine__threads=1)
    recipe, out = write_recipe(tmp_path / "r.yaml", small), tmp_path / "out"
    few = ["--rounds", "1", "--steps", "2", "--warm-ups", "1", "--out", out, "--json"]
    done = command("bench", "scaling", recipe, "--ranks", "1,2", "--oversubscribe", *few, timeout=200)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads((out / "results.json").read_text())
    rows = {(r["mode"], r["ranks"]): r for r in result["rows"]}
    assert {key: r["global_batch"] for key, r in rows.items()} == {
        ("weak", 1): 8, ("weak", 2): 16, ("strong", 1): 16, ("strong", 2): 16,
    }  # fmt: skip
    assert [rows["strong", n]["passes_per_step"] for n in (1, 2)] == [2, 1]
    for row in rows.values():
        assert row["images_per_s"] > 0 and row["rates"].keys() == {"synthetic", "loader", "end-to-end"}
        assert row["slowest_rank"] < row["ranks"] and row["nodes"] == 1
        assert row["step_s_p50"] <= row["step_s_p90"] <= row["step_s_p99"]
    assert (out / "scaling.png").stat().st_size > 1000 and "1 rank" in (out / "scaling.md").read_text()
    more = ["-m", "hpc_lbsgd.cli", "bench", "scaling", recipe, "--set", "batch.workers=2", "--mode", "weak"]
    done = mpirun(3, *more, *few)
    assert done.returncode == 0, done.stderr
    assert [(r["mode"], r["ranks"]) for r in json.loads(done.stdout)["rows"]] == [
        ("weak", 1), ("weak", 2), ("weak", 3), ("strong", 1), ("strong", 2),
    ]  # fmt: skip

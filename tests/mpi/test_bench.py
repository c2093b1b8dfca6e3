"""Benchmarks on real ranks: every way runs, and says what it did. Seconds are not looked at."""

import json

from conftest import changed, command, mpirun, write_recipe


def test_bench_step(tmp_path):
    picture = tmp_path / "step.png"
    ways = "hpc_lbsgd,hpc_lbsgd-fusion,horovod-stock,horovod-tuned,ddp,none"
    done = command(
        "bench", "step", "--ranks", "2", "--oversubscribe", "--rounds", "1", "--batch", "2,3", "--steps", "2",
        "--warm-ups", "1", "--model", "resnet8", "--image-size", "16", "--engines", ways, "--plot", picture, "--json",
        timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert {(r["way"], r["batch"]) for r in result["rows"]} == {(w, b) for w in ways.split(",") for b in (2, 3)}
    for row in result["rows"]:
        assert {"engine", "mode", "default", "ranks", "batch", "images_per_s", "exposed_comm_share"} <= row.keys()
        assert row["ranks"] == (1 if row["way"] == "none" else 2)
    assert len(result["ratios"]) == 2 * 5
    settings = {way: c["settings"] for way, c in result["conditions"].items()}
    assert "HOROVOD_CYCLE_TIME" not in settings["horovod-stock"]
    assert settings["hpc_lbsgd"]["HOROVOD_CYCLE_TIME"] == settings["horovod-tuned"]["HOROVOD_CYCLE_TIME"] == "0.1"
    assert {c["threads"] for c in result["conditions"].values()} == {result["conditions"]["none"]["threads"]}
    assert picture.stat().st_size > 1000


def test_bench_allreduce(tmp_path):
    picture = tmp_path / "allreduce.png"
    names = "horovod,torch-distributed,mpi-ring,reference-binary-blocks,reference-hierarchical"
    done = command(
        "bench", "allreduce", "--ranks", "3", "--oversubscribe", "--rounds", "1", "--bytes", "1KB,16KB", "--seconds",
        "0.01", "--algorithms", names, "--plot", picture, "--json", timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    for row in result["rows"]:
        assert {"algorithm", "ranks", "bytes", "seconds", "algbw_bytes_per_s", "busbw_bytes_per_s"} <= row.keys()
    assert {(r["algorithm"], r["bytes"]) for r in result["rows"]} == {
        (n, b) for n in names.split(",") for b in (1024, 16384)
    }
    assert [b["bytes"] for b in result["best"]] == [1024, 16384]
    assert result["libraries"]["mpi-ring"].startswith("Open MPI") and picture.stat().st_size > 1000


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


def test_a_contender_that_fails_is_named():
    done = command("bench", "step", "--rounds", "1", "--model", "no.such:thing", "--engines", "none", timeout=200)
    assert done.returncode == 1
    assert "none: mpirun ended with" in done.stderr and "no.such" in done.stderr

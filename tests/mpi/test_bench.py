"""Benchmarks on real ranks: every way runs, and says what it did. Seconds are not looked at."""

import json

from conftest import command


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


def test_a_contender_that_fails_is_named():
    done = command("bench", "step", "--rounds", "1", "--model", "no.such:thing", "--engines", "none", timeout=200)
    assert done.returncode == 1
    assert "none: mpirun ended with" in done.stderr and "no.such" in done.stderr

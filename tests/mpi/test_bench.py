"""Benchmarks on real ranks: every way runs, and says what it did. Seconds are not looked at."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path

from conftest import command, mpirun

from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.bench.allreduce import choices
from hpc_lbsgd.bench.allreduce.run import summarise
from hpc_lbsgd.parallel.horovod_engine import environment


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


def test_bench_step_tune(tmp_path):
    """A setting reaches MPI; one round gives no spread, so that the defaults stay and the file says nothing."""
    out = tmp_path / "tuned.yaml"
    done = command(
        "bench", "step", "--tune", "yield", "--oversubscribe", "--rounds", "1", "--batch", "2", "--steps", "2",
        "--warm-ups", "1", "--model", "resnet8", "--image-size", "16", "--out", out, "--json", timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    default, row = result["rows"]
    assert default["default"] and default["environment"]["OMPI_MCA_mpi_yield_when_idle"] == "1"
    assert row["setting"] == {"yield_when_idle": False} and not row["wins"] and result["tuned"] == {}
    assert row["environment"]["OMPI_MCA_mpi_yield_when_idle"] == "0"
    assert "ETA" in done.stderr
    assert recipes.read("fashion-mnist", [f"machine={out}"]) == recipes.read("fashion-mnist")


def marked(mark: str) -> list[str]:
    """Command lines of the processes whose environment has this mark."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is a zombie
            if mark.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found


def wait_for(what, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not what() and time.monotonic() < end:
        time.sleep(0.2)
    return what()


def test_a_benchmark_that_is_ended_ends_its_ranks():
    mark = f"HPC_LBSGD_TEST_MARK={uuid.uuid4()}"
    words = ["bench", "step", "--oversubscribe", "--engines", "hpc_lbsgd", "--steps", "100000", "--model", "resnet8"]
    environment = dict([*os.environ.items(), mark.split("=")])
    process = subprocess.Popen(
        [sys.executable, "-m", "hpc_lbsgd.cli", *words], env=environment, stderr=subprocess.DEVNULL
    )
    try:
        assert wait_for(lambda: sum("bench.step.measure" in line for line in marked(mark)) >= 3, 60)  # mpirun, 2 ranks
        process.terminate()
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
        assert wait_for(lambda: not marked(mark), 30), marked(mark)
    finally:
        process.kill()


def test_bench_allreduce(tmp_path):
    picture = tmp_path / "allreduce.png"
    names = "horovod,torch-distributed,mpi-tuned,mpi-ring,reference-binary-blocks,reference-hierarchical"
    rules = tmp_path / "allreduce.rules"
    done = command(
        "bench", "allreduce", "--ranks", "3", "--oversubscribe", "--rounds", "1", "--bytes", "1KB,16KB", "--seconds",
        "0.01", "--algorithms", names, "--plot", picture, "--choices", rules, "--json", timeout=400,
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
    assert result["choices"]["rules"] == [{"from_bytes": 0, "algorithm": "tuned"}]  # one round decides nothing
    assert result["choices"]["environment"]["OMPI_MCA_coll_tuned_dynamic_rules_filename"] == str(rules)
    assert rules.read_text().startswith("# hpc-lbsgd bench allreduce: 3 ranks")


def test_open_mpi_follows_the_written_choices(tmp_path, monkeypatch):
    """The order of a float32 sum tells which algorithm made it: at the size that a file says ring the bits are those
    of the ring, at others those of MPI's own choice. And determinism's ring holds against a site's file."""
    times = {("mpi-tuned", size): [1.0] * 3 for size in (1024, 16384)}
    times |= {("mpi-ring", 1024): [2.0] * 3, ("mpi-ring", 16384): [0.5] * 3}
    rules = tmp_path / "allreduce.rules"
    written = choices.write(rules, summarise(4, times, 1e-9, {}, 3, 2))

    def bits(settings):
        with monkeypatch.context() as patch:
            for key, value in settings.items():
                patch.setenv(key, value)
            done = mpirun(4, "tests/mpi/sum_bits.py", 1024, 16384)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    own, ring = bits(choices.settings("tuned")), bits(choices.settings("ring"))
    assert own[0] != ring[0] and own[1] != ring[1]
    assert bits(written["environment"]) == [own[0], ring[1]]
    assert bits(written["environment"] | environment(recipes.Machine(), "same-ranks")) == ring


def test_a_contender_that_fails_is_named():
    done = command("bench", "step", "--rounds", "1", "--model", "no.such:thing", "--engines", "none", timeout=200)
    assert done.returncode == 1
    assert "none: mpirun ended with" in done.stderr and "no.such" in done.stderr

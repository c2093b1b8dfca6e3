"""What `make train` promises: real images, real Horovod, at least 92.0 % on the 10,000 test images."""

import json
import os
from pathlib import Path

import pytest
from conftest import command, records


@pytest.mark.timeout(1500)
def test_fashion_mnist_reaches_92_percent(tmp_path):
    data = Path("data/fashion-mnist")  # where `make train` puts it; made here where it is not
    fetched = command("data", "fetch", "fashion-mnist", "--out", data.absolute(), "--json", timeout=600)
    assert fetched.returncode == 0, fetched.stderr
    assert [m["samples"] for m in json.loads(fetched.stdout)["manifests"]] == [60_000, 10_000]
    ranks = len(os.sched_getaffinity(0))
    result = command("launch", "--np", ranks, "--", "train", "fashion-mnist", "--run", tmp_path / "run",
                     timeout=1400)  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    (start,), (end,), last = records(tmp_path / "run", "start"), records(tmp_path / "run", "end"), None
    assert (start["ranks"], start["global_batch"], start["workers"]) == (ranks, 512, 16)
    last = records(tmp_path / "run", "eval")[-1]
    print(f"test accuracy {last['accuracy']:.4f} after {end['seconds']:.0f} s on {ranks} ranks")
    assert last["samples"] == 10_000 and last["epoch"] <= 6
    assert last["accuracy"] >= 0.92
    assert "done: 708 steps, test accuracy 9" in result.stderr and f"run folder: {tmp_path / 'run'}" in result.stderr

"""A real run on one rank whose disk is slow: steps go on meanwhile, and no bit of the weights is another."""

import json
import os
import subprocess
import sys

from conftest import changed, write_recipe

STEPS = 5
SLOW = """
import json, os, sys, time
from pathlib import Path
from hpc_lbsgd import cli
from hpc_lbsgd.train import checkpoint
run, last, write = Path(sys.argv[1]), int(sys.argv[2]), checkpoint.write

def after_the_next_step(folder, snapshot, keep):
    if f'"step": {snapshot.state.step - 1}, "epoch"' not in folder.metrics.read_text():
        raise OSError(5, "a kill now would lose the records of steps that are in this checkpoint")
    end = time.monotonic() + 60
    while snapshot.state.step < last and f'"step": {snapshot.state.step}, "epoch"' not in folder.metrics.read_text():
        if time.monotonic() > end:
            raise OSError(5, "the next step did not come while this was being written")
        time.sleep(0.005)
    return write(folder, snapshot, keep)

checkpoint.write = after_the_next_step
sys.exit(cli.main(sys.argv[3:]))
"""


def test_steps_go_on_while_the_disk_is_slow(small_recipe, tmp_path):
    """Each write waits for the next step's record."""
    digests = {}
    for name, every in (("each", 1), ("none", None)):
        run = tmp_path / name
        content = changed(small_recipe, determinism="any-ranks", train__max_steps=STEPS, data__eval=None,
                          checkpoint__steps=every, checkpoint__keep=99, machine__engine="torch")  # fmt: skip
        recipe = write_recipe(tmp_path / f"{name}.yaml", content)
        line = [sys.executable, "-c", SLOW, run, STEPS, "train", recipe, "--run", run]
        done = subprocess.run(list(map(str, line)), capture_output=True, text=True, timeout=200, env={**os.environ})
        assert done.returncode == 0, done.stderr
        found = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
        digests[name] = found[-1]["weights_sha256"]
        saved = {r["step"]: at for at, r in enumerate(found) if r["kind"] == "checkpoint"}
        steps = {r["step"]: at for at, r in enumerate(found) if r["kind"] == "step"}
        assert list(saved) == (list(range(1, STEPS + 1)) if every else [STEPS])
        assert all(steps[step] < at for step, at in saved.items() if step < STEPS)  # steps are counted from 0
        assert (run / "checkpoints" / "LATEST").read_text() == f"step-{STEPS:08d}\n"
        assert found[-1]["kind"] == "end"
    assert digests["each"] == digests["none"]

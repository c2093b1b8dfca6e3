"""What is a user's own, on real ranks: every optimizer of torch; docs/examples/own_code.py by recipe and by script."""

import json
import shutil
from pathlib import Path

import conftest
import pytest
import torch
from conftest import command, mpirun, records

EXAMPLE = Path("docs/examples")
REFUSED = {  # where weights have vectors, and weight decay is the recipe's default
    "LBFGS": "closures",
    "Muon": "only supports 2D parameters",
    "Rprop": "no weight decay",
    "SparseAdam": "sparse gradients",
    "SparseAdam without decay": "sparse gradients",
}


def test_every_optimizer_trains_to_the_same_bits_alone_and_on_three_ranks_or_is_refused(tmp_path):
    """In one bucket alone, in a bucket a parameter on ranks; each also goes on from a checkpoint. A tail of one sample
    leaves two ranks idle."""
    for name in ("alone", "ranks"):
        (tmp_path / name).mkdir()
    program = "tests/mpi/optimizers.py"
    alone = conftest.alone(program, tmp_path / "alone", "25")
    ranks = mpirun(3, program, tmp_path / "ranks", "0.00001")
    assert alone.returncode == ranks.returncode == 0, alone.stderr + ranks.stderr
    found, on_ranks = json.loads(alone.stdout), json.loads(ranks.stdout)
    refused = {name: what for name, what in found.items() if what.startswith("refused")}
    assert refused.keys() == REFUSED.keys()
    assert all(REFUSED[name] in what for name, what in refused.items()), refused
    assert len(found) > 15 and found == on_ranks
    trained = [what for name, what in found.items() if name not in refused and name != "torch's SGD"]
    assert len(set(trained)) == len(trained)  # each is another
    assert found["torch's SGD"] == found["SGD"]  # ours is torch's


FAILING = """
def fail(record, view):
    if record["kind"] == "step" and record["step"] == 20:
        raise KeyError("no such column")
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    for name in ("own_code.py", "own_code.yaml"):
        shutil.copy(EXAMPLE / name, folder)
    (folder / "own_fail.py").write_text(FAILING)
    return folder


def test_a_failing_callback_is_named_and_the_run_goes_on_elsewhere_to_the_bits_of_a_script(here, monkeypatch):
    """Three ranks by recipe to step 20, one rank to the end; and the same by a loop of one's own on three ranks."""
    failing = ["--set", "train.callbacks=[own_fail:fail]", "--run", "run"]
    ranks = ["launch", "--np", "3", "--oversubscribe"]
    first = command(*ranks, "--", "train", "own_code.yaml", *failing, cwd=here)
    assert first.returncode == 1, first.stderr
    assert "own_fail:fail: KeyError: 'no such column'" in first.stderr and "own_fail.py:4" in first.stderr
    status = json.loads((here / "run/status.json").read_text())
    assert status["status"] == "failed" and "own_fail.py:4" in status["error"]
    again = command("train", "own_code.yaml", "--run", "run", "--resume", "--json", cwd=here)
    assert again.returncode == 0, again.stderr
    assert "resumed at step 22" in again.stderr  # it took one more step, to end safely
    monkeypatch.setenv("PYTHONPATH", str(Path.cwd()))
    script = mpirun(3, "own_code.py", "weights.pt", cwd=here)
    assert script.returncode == 0, script.stderr
    newest = here / "run/checkpoints" / (here / "run/checkpoints/LATEST").read_text().strip()
    by_recipe, by_script = torch.load(newest / "weights.pt"), torch.load(here / "weights.pt")
    assert by_recipe.keys() == by_script.keys()
    assert all(torch.equal(by_recipe[name], by_script[name]) for name in by_recipe)
    evaluation = records(here / "run", "eval")[-1]
    measured = {name: evaluation[name] for name in ("margin", "worst_class", "accuracy", "samples")}
    assert str(measured) in script.stdout and evaluation["accuracy"] > 0.95
    assert {r["global_batch"] for r in records(here / "run", "step")} == {64, 128}
    asked = json.loads(command("evaluate", "run", "--json", cwd=here).stdout)
    assert (asked["data"], asked["loss"]) == ("own_code:data", evaluation["loss"])

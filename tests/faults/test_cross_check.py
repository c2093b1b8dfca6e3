"""A rank that computes or remembers one wrong bit is named before its step is taken."""

import json

import pytest
import torch
from conftest import changed, mpirun, records, train_many, write_recipe

from hpc_lbsgd.theory.schedule import Point
from hpc_lbsgd.train import crosscheck

EXACT = {"determinism": "any-ranks", "train__max_steps": 14, "batch__workers": 6, "batch__samples_per_worker": 4,
         "machine__cross_check_steps": 5, "checkpoint__steps": 6, "checkpoint__keep": 9}  # fmt: skip


RANK_2 = (
    r"rank 2 on \S+ \(cpu\) computed worker 2 to other bits than 4 computations elsewhere; computed again it was right"
)


@pytest.mark.parametrize("engine, kind, ranks, rank, what, step, says", [
    # step 10: worker 2, of rank 2, computed again by rank 0
    ("horovod", "int64", 3, 2, "gradient", 10, RANK_2),
    ("horovod", "int32", 3, 0, "gradient", 10, "rank 0 on"),  # the checker
    ("horovod", "int64", 3, 1, "weight", 9, "weights or buffers of rank 1 on"),
    ("horovod", "int64", 2, 1, "weight", 9, "weights or buffers differ between rank 0 on"),
    ("torch", "int32", 3, 2, "gradient", 10, RANK_2),
    ("torch", "int64", 3, 1, "weight", 9, "weights or buffers of rank 1 on"),
])  # fmt: skip
def test_the_rank_is_named_and_the_step_not_taken(small_recipe, tmp_path, engine, kind, ranks, rank, what, step, says):
    import re

    recipe = write_recipe(tmp_path / "r.yaml", changed(small_recipe, **EXACT, machine__engine=engine, fixed_point=kind))
    result = mpirun(ranks, "tests/faults/wrong_rank.py", recipe, tmp_path / "run", rank, what, step)
    assert result.returncode == 1, result.stderr
    assert re.search(rf"step 10, cross-check: .*{says}", result.stderr), result.stderr
    assert "The step was not taken" in result.stderr
    assert [r["step"] for r in records(tmp_path / "run", "step")] == list(range(10))
    (event,) = [r for r in records(tmp_path / "run", "event") if r["event"] == "cross-check"]
    assert event["step"] == 10
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["status"] == "failed" and "cross-check" in status["error"]


def test_it_changes_no_bit(small_recipe, tmp_path):
    """Every step, seldom, never; on one rank and on three, with idle ranks and tails."""
    ends = set()
    for ranks in (1, 3):
        recipes = {
            f"every-{n}": changed(small_recipe, **EXACT | {"machine__cross_check_steps": n, "train__max_steps": 10})
            for n in (0, 1, 4)
        }
        for run in train_many(ranks, recipes, tmp_path).values():
            ends.add(records(run, "end")[0]["weights_sha256"])
    assert len(ends) == 1


# ---------------------------------------------------------------- pure


def test_every_bit_of_a_buffer_changes_its_digest():
    torch.manual_seed(0)
    values = torch.randn(64)
    plain = int(crosscheck.digest([values]))
    found = set()
    for place in range(64):
        for bit in range(32):
            other = values.clone()
            other.view(torch.int32)[place] ^= 1 << bit if bit < 31 else -(2**31)
            found.add(int(crosscheck.digest([other])))
    assert plain not in found
    signs = values.clone()
    signs[1::2].neg_()  # changes that would cancel in a sum of products
    assert int(crosscheck.digest([signs])) != plain
    swapped = values[torch.arange(64).flip(0)]
    assert int(crosscheck.digest([swapped])) != plain


def test_digests_survive_a_float_sum():
    for value in (0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF0):
        halves = crosscheck.halves(torch.tensor(value))
        assert (halves + 0.0 == halves).all()
        assert crosscheck.whole(*halves.tolist()) == crosscheck.number(torch.tensor(value)) == value % 2**64


def test_every_worker_has_its_turn_on_another_host():
    partners = crosscheck.checkers(["a", "a", "b", "b"])
    assert partners == [2, 2, 0, 0]
    assert crosscheck.checkers(["a"]) == [0] and crosscheck.checkers(["a", "a"]) == [1, 0]
    pairs = [crosscheck.pair_at(Point(s, 0, s, 0.1, 0.9, 6, 4, 0, 24), 5, partners) for s in range(30)]
    seen = [p for p in pairs if p]
    assert [p.worker for p in seen] == [0, 1, 2, 3, 4, 5]
    assert all(p.owner == p.worker % 4 and p.checker != p.owner for p in seen)
    tail = Point(25, 0, 25, 0.1, 0.9, 6, 4, 0, 5)  # two workers have samples
    assert crosscheck.pair_at(tail, 5, partners).worker < 2


@pytest.mark.parametrize("owner, checker, again, says", [
    (1, 2, {0: 2, 1: 2, 2: 2}, "rank 0 computed worker 4 to other bits than 4 computations elsewhere; .* was right"),
    (1, 2, {0: 1, 1: 2, 2: 2}, "rank 0 .* wrong again"),
    (1, 2, {0: 1, 1: 1}, "rank 1 .* was right"),
    (1, 2, {0: 1, 1: 2}, "rank 0 and rank 1 compute worker 4 to different bits"),
])  # fmt: skip
def test_the_majority_names(owner, checker, again, says):
    import re

    mismatch = crosscheck.Mismatch([5, 5, 5], crosscheck.Pair(4, 0, 1), owner, checker)
    assert re.search(says, crosscheck.culprit(mismatch, again, lambda r: f"rank {r}"))

"""What `bench allreduce` makes of measured seconds, and what it refuses."""

from pathlib import Path

import pytest
from conftest import command

from hpc_lbsgd import arguments
from hpc_lbsgd.bench.allreduce import choices, run, show
from hpc_lbsgd.bench.core import launches
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.theory import collectives
from hpc_lbsgd.theory.collectives import Link

SIZES = [2**10, 2**16, 2**22]


def timed(ranks=8, rounds=3):
    """Seconds of two algorithms made from known links, and a spread of 2 % over rounds."""
    links = {"mpi-recursive-doubling": Link(1e-6, 4e-9), "reference-ring": Link(1e-6, 1e-9)}
    steps = {"mpi-recursive-doubling": 6, "reference-ring": 14}
    return {
        (name, b): [collectives.seconds(steps[name], ranks, b, link) * (1 + 0.01 * r) for r in range(rounds)]
        for name, link in links.items()
        for b in SIZES
    }


def test_rows_fits_and_choices():
    result = run.summarise(8, timed(), 0.2e-9, {}, rounds=3, node_size=2)
    row = next(r for r in result["rows"] if r["algorithm"] == "reference-ring" and r["bytes"] == 2**22)
    assert row["busbw_bytes_per_s"] == pytest.approx(row["algbw_bytes_per_s"] * 2 * 7 / 8)
    assert row["seconds_low"] < row["seconds"] < row["seconds_high"]
    ring = next(f for f in result["fits"] if f["algorithm"] == "reference-ring")
    assert (ring["alpha_s"], ring["steps"]) == (pytest.approx(1.01e-6), 14)
    # the time a byte is beta and half a gamma: T = ... + 2 (p-1)/p b beta + (p-1)/p b gamma
    assert ring["beta_s_per_byte"] + ring["gamma_s_per_byte"] / 2 == pytest.approx(1.01e-9)
    assert [b["algorithm"] for b in result["best"]] == ["mpi-recursive-doubling", "reference-ring", "reference-ring"]
    (crossing,) = result["crossovers"]
    assert 2**10 < crossing["bytes"] < 2**16
    assert "best by size" in show.show(result)


def test_a_best_that_overlaps_is_marked():
    times = {("mpi", 1024): [1.0, 1.2, 1.4], ("horovod", 1024): [1.1, 1.3, 1.5]}
    (best,) = run.summarise(2, times, 1e-9, {}, 3, 2)["best"]
    assert best["algorithm"] == "mpi" and not best["clear"]


def chosen(times, rounds=3):
    result = run.summarise(4, times, 1e-9, {}, rounds, 2)
    return choices.rules(result), result


def test_a_rule_needs_rounds_that_do_not_overlap():
    """1 KB: faster, but not in every round. 4 KB: clearly faster. 16 KB: MPI's own choice is the best."""
    times = {
        ("mpi-tuned", 1024): [1.0, 1.2, 1.4], ("mpi-ring", 1024): [0.9, 1.0, 1.1],
        ("mpi-tuned", 4096): [2.0, 2.1, 2.2], ("mpi-ring", 4096): [1.7, 1.8, 1.9],
        ("mpi-tuned", 16384): [3.0, 3.1, 3.2], ("mpi-ring", 16384): [4.0, 4.1, 4.2],
    }  # fmt: skip
    found, _ = chosen(times)
    assert found == [(0, "tuned"), (2048, "ring"), (8192, "tuned")]
    assert chosen({k: v[:2] for k, v in times.items()}, rounds=2)[0] == [(0, "tuned")]


def test_choices_end_above_the_largest_size_and_at_other_numbers_of_ranks():
    found, result = chosen({("mpi-tuned", 1024): [1.0] * 3, ("mpi-ring", 1024): [0.5] * 3})
    assert found == [(0, "ring"), (2048, "tuned")]
    numbers = [line.split("#")[0].split() for line in choices.to_text(result, found).splitlines()]
    expected = "1 2 3 1 1 0,0,0,0 4 2 0,4,0,0 2048,0,0,0 5 1 0,0,0,0"
    assert [",".join(n) for n in numbers if n] == expected.split()


def test_what_the_rules_cost_is_said():
    """On several nodes plain MPI may use another component, which the rules shut out."""
    times = {("mpi-tuned", 1024): [1.0] * 3, ("mpi-ring", 1024): [0.5] * 3, ("mpi", 1024): [0.4] * 3}
    found, result = chosen(times)
    assert choices.costs(result, found) == [1024]


def test_sizes_and_contenders():
    assert run.sizes(2**20) == [2**10, 2**12, 2**14, 2**16, 2**18, 2**20]
    assert "reference-halving-doubling" not in run.choose(None, 3)
    ring = run.contender("mpi-ring", 2, SIZES, 0.1, 2)
    assert ring.settings["OMPI_MCA_coll_tuned_allreduce_algorithm"] == "4" and ring.task["via"] == "mpi"


def test_a_contender_starts_without_the_callers_engine_settings(monkeypatch):
    monkeypatch.setenv("HOROVOD_CYCLE_TIME", "7")
    monkeypatch.setenv("OMPI_MCA_mpi_yield_when_idle", "1")
    found = launches.environment(launches.Contender("stock", {"HOROVOD_X": "1"}, {}, 2))
    assert "HOROVOD_CYCLE_TIME" not in found and "OMPI_MCA_mpi_yield_when_idle" not in found
    assert found["HOROVOD_X"] == "1" and "PATH" in found


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"names": ["magic"]}, "--algorithms magic: allowed are horovod"),
        ({"names": ["reference-halving-doubling"], "ranks": 3}, "on 3 ranks"),
        ({"listed": [6]}, "--bytes 6"),
        ({"listed": [2**31]}, "--bytes 2147483648"),
        ({"rules": Path("no/such/rules")}, "--choices no/such/rules: no folder"),
        ({"rules": Path("rules"), "names": ["mpi-tuned", "horovod"]}, "--algorithms must have mpi-tuned and"),
        ({"rules": Path("rules"), "names": ["mpi", "mpi-ring"]}, "--algorithms must have mpi-tuned and"),
    ],
)
def test_wrong_requests(changes, said):
    asked = {"ranks": 2, "listed": None, "largest": 1024, "names": None, "rounds": 1, "seconds": 0.1, "node_size": 2,
             "timeout_s": 10, "oversubscribe": True, "rules": None}  # fmt: skip
    with pytest.raises(RequestError, match=said):
        run.allreduce(**asked | changes)


def test_the_command_line_reads_sizes():
    assert arguments.byte_counts("1KB,4MB,1GB,12") == [1024, 4 * 2**20, 2**30, 12]
    done = command("bench", "allreduce", "--bytes", "many")
    assert done.returncode == 2 and "--bytes" in done.stderr

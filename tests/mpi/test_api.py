"""A plain script of the library under real MPI, and the same one in one process without it."""

import re
from pathlib import Path

import conftest
from conftest import mpirun

SCRIPT, HABITS = Path("docs/examples/train_any_ranks.py"), Path("tests/mpi/api_habits.py")


def test_a_script_makes_the_same_bits_alone_and_on_three_ranks_and_opens_their_file(tmp_path):
    """24 steps; the last of each epoch has 4 samples, and two of three ranks none. One process takes the torch engine,
    ranks under mpirun Horovod."""
    alone = conftest.alone(SCRIPT)
    ranks = mpirun(3, SCRIPT, tmp_path)
    assert alone.returncode == 0 and alone.stdout.count("\n") == 4, alone.stdout + alone.stderr
    assert ranks.returncode == 0 and ranks.stdout == alone.stdout, ranks.stdout + ranks.stderr
    again = conftest.alone(SCRIPT, tmp_path)
    assert again.stdout.splitlines() == alone.stdout.splitlines()[-1:], again.stdout + again.stderr


def test_habits_that_differ_by_rank_are_one_ranks_or_refused(tmp_path):
    alone = conftest.alone(HABITS, tmp_path / "state.pt")
    ranks = mpirun(3, HABITS, tmp_path / "state.pt")
    assert alone.returncode == ranks.returncode == 0, alone.stderr + ranks.stdout + ranks.stderr
    one, three = ({line.split(": ", 1)[0]: line for line in job.stdout.splitlines()} for job in (alone, ranks))
    assert len(one) == len(three) == 10
    assert [case for case in one if one[case] == three[case]] == list(one)[:5], ranks.stdout
    assert "schedule.epochs = 1, and this is 2" in one["a file under another schedule"]
    wrong = ("has a model of", "has seed 1", "has seed 1", "is of rank . of 1, and this is rank",
             "weights differ between ranks at the sum of step 1")  # fmt: skip
    for line, said in zip(list(three.values())[5:], wrong, strict=True):
        assert re.search(f"refused: .*{said}", line), line

"""A plain script of the library under real MPI, and the same one in one process without it."""

import subprocess
import sys
from pathlib import Path

from conftest import mpirun

SCRIPT = Path("docs/examples/train_any_ranks.py")


def test_a_script_makes_the_same_bits_alone_and_on_three_ranks_and_opens_their_file(tmp_path):
    """24 steps; the last of each epoch has 4 samples, and two of three ranks none. One process takes the torch engine,
    ranks under mpirun Horovod."""
    alone = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, timeout=120)
    ranks = mpirun(3, SCRIPT, tmp_path, timeout=120)
    assert alone.returncode == 0 and alone.stdout.count("\n") == 4, alone.stdout + alone.stderr
    assert ranks.returncode == 0 and ranks.stdout == alone.stdout, ranks.stdout + ranks.stderr
    again = subprocess.run([sys.executable, SCRIPT, tmp_path], capture_output=True, text=True, timeout=120)
    assert again.stdout.splitlines() == alone.stdout.splitlines()[-1:], again.stdout + again.stderr

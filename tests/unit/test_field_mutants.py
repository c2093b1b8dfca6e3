"""Tables, tars, manifests and shards with fields of every kind, damaged: read, or refused by one message."""

import json
import os
import subprocess
import sys
from pathlib import Path

CASES = 30  # of each of the 13 kinds
HERE = Path(__file__).parent


def test_no_mutant_ends_in_a_traceback_a_hang_or_in_much_memory(tmp_path):
    """The same ones each time; others by FIELD_MUTANTS_SEED."""
    seed = os.environ.get("FIELD_MUTANTS_SEED", "0")
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    words = [sys.executable, HERE / "field_mutants.py", tmp_path / "set", seed, str(CASES)]
    result = subprocess.run(words, capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": path})
    assert result.returncode == 0, result.stderr[-3000:]
    *wrong, counted = result.stdout.splitlines()
    counts = json.loads(counted)
    assert not wrong, "\n".join(wrong)
    assert sum(counts.values()) == 13 * CASES and counts["refused"] > 4 * CASES

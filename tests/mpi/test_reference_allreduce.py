"""The reference allreduces on real ranks: exact sums, and counted sends equal to the papers' formulas."""

import json

from conftest import mpirun


def test_agree_with_mpi_on_1_to_17_ranks(monkeypatch):
    monkeypatch.setenv("OMPI_MCA_mpi_yield_when_idle", "1")  # 17 ranks on few cores: who waits must step aside
    result = mpirun(17, "tests/mpi/collectives_ranks.py", timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(result.stdout)
    assert found["faults"] == []
    assert found["cases"] == 4 * (17 * 6 + 5)  # six that take any p, halving-doubling on 1, 2, 4, 8, 16

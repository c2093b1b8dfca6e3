"""`doctor` says what is less than was promised."""

import pytest

from hpc_lbsgd.cluster import doctor, mpi_check

FACTS = {"ranks": 2, "nodes": ["a"], "device": "cuda", "right": True, "bytes": 1, "seconds": 1.0,
         "busbw_bytes_per_s": 1.0}  # fmt: skip


@pytest.mark.parametrize("cores, per_task, level", [(1, None, "warn"), (4, None, "ok"), (4, "8", "warn")])
def test_cores_that_a_launcher_hides_are_named(cores, per_task, level, monkeypatch):
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    if per_task:
        monkeypatch.setenv("SLURM_CPUS_PER_TASK", per_task)
    monkeypatch.setattr(mpi_check, "measure", lambda hosts: FACTS | {"cores": cores})
    found = {f.what: f for f in doctor.check_mpi_for_real(None)}
    assert found["cores a rank"].level == level

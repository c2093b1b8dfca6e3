"""`doctor` says what is less than was promised, and which node is slower than the others."""

import pytest

from hpc_lbsgd.cluster import check_ranks, doctor, node_check, on_ranks

FACTS = {"ranks": 2, "nodes": ["a"], "device": "cuda", "right": True, "bytes": 1, "seconds": 1.0,
         "busbw_bytes_per_s": 1.0}  # fmt: skip


@pytest.mark.parametrize("kind, level", [("lustre", "warn"), ("nfs4", "warn"), ("ext4", "ok"), ("tmpfs", "ok")])
def test_an_environment_that_many_ranks_would_read_from_a_shared_file_system(kind, level, monkeypatch):
    monkeypatch.setattr(doctor, "file_system", lambda path: kind)
    (found,) = doctor.check_environment()
    assert found.level == level and found.found.startswith(f"{kind} (") and "make bundle" in found.fix


@pytest.mark.parametrize("cores, per_task, level", [(1, None, "warn"), (4, None, "ok"), (4, "8", "warn")])
def test_cores_that_a_launcher_hides_are_named(cores, per_task, level, monkeypatch):
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    if per_task:
        monkeypatch.setenv("SLURM_CPUS_PER_TASK", per_task)
    monkeypatch.setattr(check_ranks, "measure", lambda *words: FACTS | {"cores": cores})
    found = {f.what: f for f in on_ranks.check_mpi(None)}
    assert found["cores a rank"].level == level


@pytest.mark.parametrize("places", range(1, 10))
def test_everybody_meets_everybody_once(places):
    met = []
    for partners in node_check.pairs(places):
        assert [partners[p] for p in partners] == list(range(places)), "who is sent to sends back"
        met += [(a, b) for a, b in enumerate(partners) if a < b]
    assert sorted(met) == [(a, b) for a in range(places) for b in range(a + 1, places)]


def test_what_is_far_below_the_median_is_slow():
    good = {"matrix product": 1e13, "copy in memory": 1e11, "read of the data": 1e9, "sending to others": 1e9}
    found = [dict(good) for _ in range(8)]
    found[1]["matrix product"] *= 0.8  # within what is normal
    found[3] |= {"matrix product": 6.9e12, "read of the data": 0.0}
    del found[5]["sending to others"]  # not its node's first rank
    hosts = [f"n{r // 2}" for r in range(8)]
    slow = node_check.slow_ones(hosts, found)
    assert [(s.host, s.rank, s.what) for s in slow] == [("n1", 3, "matrix product"), ("n1", 3, "read of the data")]
    assert str(slow[0]) == "n1, rank 3: matrix product 6.9 TFLOP/s, 69% of the median"
    assert node_check.slow_ones(hosts[:1], found[3:4]) == []
    assert [s.rank for s in node_check.slow_ones(hosts[:2], [good, found[3] | {"read of the data": 1e9}])] == [1]

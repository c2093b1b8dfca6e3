"""`doctor --nodes` on real ranks: the one that is slow is named, by the node that it is on."""

import json
import os

from conftest import mpirun

from hpc_lbsgd.cluster import check_ranks

SLOWED = """
import os, runpy, sys, time
import torch

if os.environ.get("OMPI_COMM_WORLD_RANK") == "1":
    quick = torch.matmul
    torch.matmul = lambda *words: (time.sleep(0.1), quick(*words))[1]
os.environ["SLURMD_NODENAME"] = "node-" + os.environ["OMPI_COMM_WORLD_RANK"]
sys.argv = ["node_check", "--read", sys.argv[1]]
runpy.run_module("hpc_lbsgd.cluster.node_check", run_name="__main__")
"""


def test_a_slow_rank_is_named(tmp_path):
    (tmp_path / "slowed.py").write_text(SLOWED)
    (tmp_path / "shard.tar").write_bytes(os.urandom(2**20))
    done = mpirun(3, tmp_path / "slowed.py", tmp_path, timeout=120)
    line = next(line for line in done.stdout.splitlines() if line.startswith(check_ranks.MARK))
    found = json.loads(line.removeprefix(check_ranks.MARK))
    assert (found["ranks"], found["nodes"]) == (3, ["node-0", "node-1", "node-2"]), done.stderr
    assert set(found["median"]) == {"matrix product", "copy in memory", "read of the data", "sending to others"}
    assert [one["host"] for one in found["slow"] if one["what"] == "matrix product"] == ["node-1"]
    assert "slow: node-1, rank 1: matrix product" in done.stderr

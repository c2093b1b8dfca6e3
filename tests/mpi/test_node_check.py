"""`doctor --nodes` on real ranks: the one that is slow is named, by the node that it is on."""

import json
import os
import socket
import sys

from conftest import command, mpirun

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
    done = mpirun(3, tmp_path / "slowed.py", tmp_path)
    line = next(line for line in done.stdout.splitlines() if line.startswith(check_ranks.MARK))
    found = json.loads(line.removeprefix(check_ranks.MARK))
    assert (found["ranks"], found["nodes"]) == (3, ["node-0", "node-1", "node-2"]), done.stderr
    assert set(found["median"]) == {"matrix product", "copy in memory", "read of the data", "sending to others"}
    assert [one["host"] for one in found["slow"] if one["what"] == "matrix product"] == ["node-1"]
    assert "slow: node-1, rank 1: matrix product" in done.stderr


def test_a_job_measures_its_nodes_by_what_starts_its_ranks(tmp_path):
    """mpirun, or what the script says in the place of srun. One node is slower than no other; its ranks may be."""
    (tmp_path / "srun").write_text("#!/bin/sh\nwhile [ $1 != --ntasks=2 ]; do shift; done; shift\n"
                                   'exec mpirun -np 2 --oversubscribe "$@"\n')  # fmt: skip
    (tmp_path / "srun").chmod(0o755)
    words = ["slow-nodes", "goyal-resnet50", "--hosts", "localhost", "--ranks-per-node", "2"]
    for env in ({}, {"HPC_LBSGD_SRUN": f"{tmp_path}/srun --nodes=1"}):
        done = command(*words, env={"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}", **env})
        assert done.returncode == 0 and "1 nodes measured in" in done.stderr, done.stderr
        assert set(done.stdout.split()) <= {socket.gethostname().partition(".")[0]}
    refused = command(*words, env={"HPC_LBSGD_SRUN": "false"})
    assert refused.returncode == 1 and "nodes were not measured: " in refused.stderr, refused.stderr

"""A rank of two on one node that keep what they read: all samples, in an order of its own."""

import sys
from pathlib import Path

import numpy as np

from hpc_lbsgd.data import kept, remote
from hpc_lbsgd.data.manifest import Manifest
from hpc_lbsgd.data.storage import open_storage

remote.TOGETHER = 0  # a request a sample
manifest, top, rank = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
m = Manifest(Path(manifest))
kept.begin([m], top, None, rank, 2)
storage = open_storage(m)
order = np.random.default_rng(rank).permutation(len(m)).tolist()
for i in range(0, len(order), 10):
    storage.expect(storage.pieces(order[i : i + 10], [None]), 0)
    for sample in order[i : i + 10]:
        assert len(storage.content(sample)) == m.sizes[sample]

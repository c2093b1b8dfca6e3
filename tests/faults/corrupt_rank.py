"""Run under mpirun: one rank's weights change by a bit; every rank must hear of it, by name."""

import torch

from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.errors import RunError
from hpc_lbsgd.parallel import engine as engines
from hpc_lbsgd.train.replica import Replica

CPU = torch.device("cpu")
recipe = recipes.validate({"model": {"name": "resnet8"}})
engine = engines.create(recipe.machine, "off", CPU)
replica = Replica(recipe, 10, engine, CPU)
if engine.rank == 2:
    replica.buckets.buckets[0].weights.mul_(1.5)
replica.synchronise()  # broadcasts rank 0's: equal again
if engine.rank == 2:
    replica.running.flat[3] += 1e-6
try:
    replica.check_equal("end")
except RunError as problem:
    assert "ranks [2] are not equal to rank 0" in str(problem), problem
    print("caught")
engine.close()

"""Run under mpirun: train a recipe while one rank computes, or remembers, one wrong bit.

wrong_rank.py RECIPE RUN RANK gradient|weight STEP     at STEP, once
"""

import sys

import torch

from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.parallel import world
from hpc_lbsgd.parallel.fixed_point import FixedPoint
from hpc_lbsgd.train.job import train
from hpc_lbsgd.train.replica import Replica

path, run, rank, what, step = sys.argv[1:]
mine = world.from_environment().rank == int(rank)
now = {"step": -1, "done": False}
begin, add, update = Replica.begin_pass, FixedPoint.add, Replica.update


def flip(values: torch.Tensor) -> None:
    values.view(torch.int32)[len(values) // 2 + 40] ^= 1 << 22
    now["done"] = True


def noticing(self, at, workers, counts):
    now["step"] = at
    begin(self, at, workers, counts)


def wrong_gradient(self, index, *how):
    if mine and now["step"] == int(step) and not now["done"] and index == 0:
        flip(self.flats[index][self.layouts[index].statistics :])
    add(self, index, *how)


def wrong_weight(self, point, *more):
    update(self, point, *more)
    if mine and point.step == int(step):
        flip(self.buckets.buckets[0].weights[self.buckets.buckets[0].layout.statistics :])


Replica.begin_pass = noticing
if what == "gradient":
    FixedPoint.add = wrong_gradient
else:
    Replica.update = wrong_weight
sys.exit(train("wrong", recipes.read(path), run))

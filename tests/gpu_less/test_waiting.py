"""How a rank on a GPU waits for Horovod."""

import time

import pytest
import torch

from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.parallel import horovod_engine
from hpc_lbsgd.parallel.horovod_engine import HorovodEngine


@pytest.mark.parametrize("on_gpu, sleeps", [(True, 3), (False, 0)])
def test_it_sleeps_until_the_sum_is_there(on_gpu, sleeps, monkeypatch):
    """On CPUs as before: MPI's own yields there."""
    engine = HorovodEngine(recipes.Machine(), "off", torch.device("cpu"))
    engine._polls = on_gpu
    slept, asked, poll = [], [], engine._hvd.poll
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(engine._hvd, "poll", lambda handle: len(asked) == 3 or asked.append(poll(handle)))
    x = torch.arange(5.0)
    engine.wait(engine.start_sum(x, "x"))
    assert slept == [horovod_engine.POLL_S] * sleeps and torch.equal(x, torch.arange(5.0))


def test_cycles_are_short_where_buckets_come_every_few_ms():
    assert horovod_engine.defaults(on_gpu=True)["HOROVOD_CYCLE_TIME"] == "0.25"
    assert horovod_engine.defaults(on_gpu=False)["HOROVOD_CYCLE_TIME"] == "0.1"

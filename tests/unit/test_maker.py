"""A user's samples made in processes: the same bits as in threads, and an end with every end of the rank."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from hpc_lbsgd.data.maker import Maker
from hpc_lbsgd.data.storage import Request
from hpc_lbsgd.data.user import UserSet
from hpc_lbsgd.data.user_loader import UserLoader
from hpc_lbsgd.errors import RunError

HERE = os.path.dirname(__file__)
CPU = torch.device("cpu")


class Noisy:
    """Samples with labels of two kinds, that chatter."""

    def __init__(self, part):
        self.part, self.fingerprint = part, "1"

    def __len__(self):
        return 50

    def sample(self, index, rng):
        print(f"sample {index}")
        if index == 13:
            raise ValueError("thirteen is no sample")
        if index == 49:
            os._exit(3)
        x = torch.from_numpy(rng.normal(size=(3, 5)))
        return x.to(torch.bfloat16), {"kind": index % 3, "sum": x.sum(), "pid": os.getpid()}


class Another(Noisy):
    """Other data each time."""

    def __init__(self, part):
        super().__init__(part)
        self.fingerprint = str(os.getpid())


@pytest.fixture(autouse=True)
def reached(monkeypatch):
    """By processes, as a folder that a user starts in is."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([HERE, os.environ.get("PYTHONPATH", "")]))


def made(processes, requests):
    loader = UserLoader(UserSet("test_maker:Noisy", "train"), 7, 2, 2, False, CPU, processes)
    found = list(loader.batches(requests))
    return [(b.inputs, b.labels["kind"], b.labels["sum"]) for b in found], {
        int(p) for b in found for p in b.labels["pid"]
    }


def test_the_same_bits_as_in_threads():
    requests = [Request(e, np.array(some)) for e in (0, 1) for some in ([4, 8, 15], [16, 23], [42])]
    (threads, here), (processes, there) = made(None, requests), made(2, requests)
    assert here == {os.getpid()} and os.getpid() not in there and 1 <= len(there) <= 2
    for one, two in zip(threads, processes, strict=True):
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(one, two, strict=True))
    alive = [pid for pid in there if os.path.exists(f"/proc/{pid}")]
    assert not alive  # the loader is gone, and so are they


def test_what_goes_wrong_is_said_with_its_reason():
    maker = Maker(UserSet("test_maker:Noisy", "eval"), 0)
    with pytest.raises(
        RunError, match="(?s)in a process that makes its samples:.*line .*, in sample.*thirteen is no sample"
    ):
        maker.make(Request(0, np.array([12, 13])))
    assert len(maker.make(Request(0, np.array([12, 14]))).inputs) == 2
    with pytest.raises(RunError, match=r"has ended \(exit code 3\): where memory ran out"):
        maker.make(Request(0, np.array([49])))
    with pytest.raises(RunError, match="made a second time, in a process of its own, it is another set"):
        Maker(UserSet("test_maker:Another", "train"), 0)


KILLED = """
import os, signal, sys
import numpy as np
from hpc_lbsgd.data.maker import Maker
from hpc_lbsgd.data.storage import Request
from hpc_lbsgd.data.user import UserSet
maker = Maker(UserSet("test_maker:Noisy", "train"), 0)
signal.signal(signal.SIGUSR1, lambda *what: None)
os.killpg(0, signal.SIGUSR1)
maker.make(Request(0, np.array([1])))
assert maker.process.poll() is None
print(maker.process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_no_process_outlives_its_rank_and_none_ends_by_the_signals_that_stop_it():
    done = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, text=True, start_new_session=True)
    (pid,) = done.stdout.split()
    until = time.monotonic() + 20
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < until:
        if "Z (zombie)" in open(f"/proc/{pid}/status").read():  # noqa: SIM115
            break
        time.sleep(0.05)
    else:
        assert not os.path.exists(f"/proc/{pid}"), done.stderr

"""What hangs, hangs alone: a disk that does not answer holds up a thread, and nobody who wants to leave."""

import io
import signal
import subprocess
import sys
import threading

import pytest

from hpc_lbsgd.data.ahead import ahead
from hpc_lbsgd.train.stops import Stops


def test_who_stops_asking_does_not_wait_for_what_hangs():
    hangs, begun, over = threading.Event(), threading.Event(), threading.Event()

    def read(item):
        if item:
            begun.set()
            hangs.wait(120)
        return item

    def ask():
        found = ahead(read, range(5), 2, 2)
        assert next(found) == 0
        assert begun.wait(60)
        found.close()
        over.set()

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    ended = over.wait(60)
    hangs.set()
    assert ended
    thread.join(60)


def test_what_was_begun_comes_in_order_and_a_failure_in_its_turn():
    assert list(ahead(lambda i: i * i, range(20), 3, 4)) == [i * i for i in range(20)]
    found = ahead(lambda i: 1 // (2 - i), range(5), 3, 2)
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(found)


CTRL_C = """
import threading
from concurrent.futures import ThreadPoolExecutor
from hpc_lbsgd import cli

def train(args):
    ThreadPoolExecutor(1).submit(threading.Event().wait)
    raise KeyboardInterrupt

cli.train = train
cli.run()
"""


def test_ctrl_c_ends_a_process_whose_thread_hangs():
    words = [sys.executable, "-c", CTRL_C, "train", "fashion-mnist"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 130 and done.stderr == "hpc-lbsgd: ended by Ctrl-C\n"


def test_a_signal_is_heard_while_a_line_is_being_written(monkeypatch):
    """A terminal that is held (Ctrl-S), a slow `tee`: the program stands in a write when it is asked to stop."""

    class Held(io.RawIOBase):
        lines = 0

        def writable(self):
            return True

        def write(self, content):
            self.lines += 1
            if self.lines == 1:
                signal.raise_signal(signal.SIGUSR1)
            return len(content)

    before = signal.getsignal(signal.SIGUSR1)
    stops = Stops(alone=True)
    signal.signal(signal.SIGUSR1, stops._on_signal)
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BufferedWriter(Held()), line_buffering=True))
    try:
        print("step 7", file=sys.stderr, flush=True)
    finally:
        signal.signal(signal.SIGUSR1, before)
    stops._lead = False
    assert stops.asked()

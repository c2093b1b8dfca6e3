"""`launch` and what a person asks of it, beside a job that is any program."""

import os
import signal
import subprocess
import threading
import time

import pytest

from hpc_lbsgd.cluster.launch import Asked, wait
from hpc_lbsgd.errors import EXIT_FAILED
from hpc_lbsgd.records import RunFolder


@pytest.fixture
def job(tmp_path):
    """(what was asked of it, its folder, `ended`: whether its processes are over)"""
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, *USR)}
    for number in before:  # as at a terminal, whatever started the tests: in the background SIGINT would be ignored
        signal.signal(number, signal.SIG_DFL)
    folder, process = RunFolder(tmp_path / "run"), subprocess.Popen(["sleep", "60"], start_new_session=True)
    asked, codes = Asked(folder), []
    thread = threading.Thread(target=lambda: codes.append(wait(process, folder, None, asked)))
    thread.start()
    yield folder, thread, codes
    process.kill()
    thread.join(30)
    for number, handler in before.items():
        signal.signal(number, handler)


USR = (signal.SIGUSR1, signal.SIGUSR2)


@pytest.mark.parametrize("saving", [False, True])
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_it_but_not_the_checkpoint_that_is_being_written(job, capsys, saving, second):
    folder, thread, codes = job
    building = folder.checkpoints / ".step-00000005.77"
    building.mkdir(parents=True)
    os.kill(os.getpid(), signal.SIGINT)
    if not saving:
        building.rmdir()
    os.kill(os.getpid(), second)
    if saving:
        time.sleep(1.5)
        assert thread.is_alive() and "does not wait for it" in capsys.readouterr().err
        building.rename(folder.checkpoints / "step-00000005")
    thread.join(30)
    assert codes == [EXIT_FAILED]


def test_the_third_does_not_wait_for_the_checkpoint(job):
    folder, thread, codes = job
    (folder.checkpoints / ".step-00000005.77").mkdir(parents=True)
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGINT)
    thread.join(30)
    assert codes == [EXIT_FAILED]


def test_other_signals_ask_for_a_safe_stop_however_often_they_come(job):
    folder, thread, codes = job
    folder.path.mkdir()
    for number in (signal.SIGHUP, *USR, signal.SIGHUP, *USR):
        os.kill(os.getpid(), number)
    until = time.monotonic() + 30
    while not folder.stop_file.exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert folder.stop_file.exists() and thread.is_alive() and not codes

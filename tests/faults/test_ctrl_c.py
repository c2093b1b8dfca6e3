"""Ctrl-C and a closed terminal, through a real pseudo-terminal: what a person sees, and what is left."""

import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import changed, records, write_images, write_recipe

from hpc_lbsgd.data import tree as trees


class Terminal:
    """A command in the foreground of a terminal of its own."""

    def __init__(self, *words, cwd, program=("-m", "hpc_lbsgd.cli")):
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            try:
                os.chdir(cwd)
                for number in (signal.SIGINT, signal.SIGHUP):  # a test run in the background has them ignored
                    signal.signal(number, signal.SIG_DFL)
                os.environ["PYTHONPATH"] = str(Path(__file__).parents[2])
                os.execv(sys.executable, [sys.executable, *map(str, [*program, *words])])
            finally:
                os._exit(99)
        self.folder, self.text, self.code = str(cwd), "", None
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        try:
            while data := os.read(self.master, 65536):
                self.text += data.decode(errors="replace")
        except OSError:
            pass  # it is closed

    def ctrl_c(self):
        os.write(self.master, b"\x03")

    def close(self):
        os.close(self.master)

    def over(self):
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is not None

    def wait_for(self, is_so, within_s=120):
        end = time.monotonic() + within_s
        while not is_so():
            assert time.monotonic() < end and (not self.over() or is_so()), self.text
            time.sleep(0.02)

    def end(self, within_s=60):
        """(exit code, what was shown); no process of it is left."""
        self.wait_for(self.over, within_s)
        end = time.monotonic() + 10
        while (left := processes(self.folder)) and time.monotonic() < end:
            time.sleep(0.1)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        assert not left, self.text
        assert "Traceback" not in self.text, self.text
        return self.code, self.text


def processes(folder):
    """Those whose command line or working folder is in `folder`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                here = os.readlink(entry / "cwd") == folder or folder in (entry / "cmdline").read_text()
                found += [int(entry.name)] if here and (entry / "cmdline").read_text() else []
            except OSError:
                continue
    return found


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path):
    """Where a test fails, its long run must not take the cores of those after it."""
    yield
    for pid in processes(str(tmp_path)):
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def recipe(small_recipe, tmp_path):
    long = {"train__max_steps": 100000, "train__epochs": 100000, "data__eval": None, "checkpoint__steps": 5}
    return write_recipe(tmp_path / "r.yaml", changed(small_recipe, **long))


def launch(tmp_path, recipe, *more):
    words = ["launch", "--np", "2", "--oversubscribe", "--", "train", recipe, "--run", "run", *more]
    return Terminal(*words, cwd=tmp_path)


def status(run):
    return json.loads((run / "status.json").read_text())


def test_the_first_stops_a_launch_safely_also_in_its_start_up_and_the_second_at_once(recipe, tmp_path):
    run = tmp_path / "run"
    terminal = launch(tmp_path, recipe)
    terminal.wait_for((run / "owner.json").exists)
    terminal.ctrl_c()
    code, text = terminal.end(120)
    assert code == 75 and text.count("asked to stop: the next step ends with a checkpoint") == 1, text
    assert "stopped at a safe point" in text
    done = status(run)["step"]
    assert status(run)["status"] == "stopped" and (run / "checkpoints" / f"step-{done:08d}").exists()
    terminal = launch(tmp_path, recipe, "--resume")
    terminal.wait_for(lambda: len(records(run, "step")) > done + 7)
    os.kill(json.loads((run / "heartbeats" / "rank-00001.json").read_text())["pid"], signal.SIGSTOP)  # no safe point
    terminal.ctrl_c()
    terminal.wait_for(lambda: "Ctrl-C again ends at once" in terminal.text)
    terminal.ctrl_c()
    code, text = terminal.end()
    assert code == 130 and "ended at once; continue with --resume" in text, text
    assert status(run)["status"] in ("failed", "stopped")  # mpirun wakes a rank before it kills it
    assert not (run / "owner.json").exists() and not (run / "stop").exists()


def test_a_closed_terminal_stops_a_launch_safely(recipe, tmp_path):
    run = tmp_path / "run"
    terminal = launch(tmp_path, recipe)
    terminal.wait_for(lambda: len(records(run, "step")) > 2)
    terminal.close()
    assert terminal.end(90)[0] == 75
    assert status(run)["status"] == "stopped" and not (run / "owner.json").exists()


def test_train_alone(recipe, tmp_path):
    """At once before the first step, with nothing left; then safely; then at once."""
    run = tmp_path / "run"
    terminal = Terminal("train", recipe, "--run", "run", cwd=tmp_path)
    terminal.wait_for(lambda: (run / "owner.json").exists() or terminal.text)
    terminal.ctrl_c()
    code, text = terminal.end()
    assert code == 130 and text.count("hpc-lbsgd: ended by Ctrl-C") == 1, text
    assert not run.exists()
    terminal = Terminal("train", recipe, "--run", "run", cwd=tmp_path)
    terminal.wait_for(lambda: len(records(run, "step")) > 2)
    terminal.ctrl_c()
    code, text = terminal.end()
    assert code == 75 and "asked to stop" in text and status(run)["status"] == "stopped", text


def test_the_second_waits_for_the_checkpoint_that_is_being_written(recipe, tmp_path):
    run, slow = tmp_path / "run", Path(__file__).with_name("slow_save.py")
    terminal = Terminal("train", recipe, "--run", "run", cwd=tmp_path, program=(slow, 4))
    terminal.wait_for(lambda: list(run.glob("checkpoints/.step-*")))
    step = int(next(run.glob("checkpoints/.step-*")).name.split("-")[1].split(".")[0])
    terminal.ctrl_c()
    terminal.wait_for(lambda: "asked to stop" in terminal.text)
    terminal.ctrl_c()
    terminal.wait_for(lambda: "Ctrl-C again does not wait for it" in terminal.text)
    code, text = terminal.end()
    assert code == 130 and "ended by Ctrl-C" in text, text
    assert [r["step"] for r in records(run, "checkpoint")][-1] >= step
    assert (run / "checkpoints" / f"step-{step:08d}" / "state.json").exists()
    assert status(run)["status"] == "failed" and not list(run.glob("checkpoints/.step-*"))


def test_train_alone_outlives_its_terminal_and_its_pipe(recipe, tmp_path):
    """Nobody is there to be told any more: the run still ends with a checkpoint, a status and its own code."""
    run = tmp_path / "run"
    terminal = Terminal("train", recipe, "--run", "run", cwd=tmp_path)
    terminal.wait_for(lambda: len(records(run, "step")) > 2)
    terminal.close()
    assert terminal.end(90)[0] == 75
    done = status(run)["step"]
    assert status(run)["status"] == "stopped" and (run / "checkpoints" / f"step-{done:08d}").exists()
    reader, writer = os.pipe()
    line = [sys.executable, "-m", "hpc_lbsgd.cli", "train", str(recipe), "--run", "run", "--resume"]
    job = subprocess.Popen(line, cwd=tmp_path, stdout=writer, stderr=writer)
    os.close(writer)
    os.read(reader, 1)
    os.close(reader)  # `train 2>&1 | head -1`
    begun = time.monotonic()
    while len(records(run, "step")) < done + 12 and time.monotonic() < begun + 90:
        time.sleep(0.1)
    job.send_signal(signal.SIGTERM)
    assert job.wait(60) == 75
    assert status(run)["status"] == "stopped" and status(run)["step"] > done


def test_commands_end_with_one_line_and_nothing_half_written(tmp_path):
    write_images(tmp_path / "set", 1500, 64)
    trees.index(write_images(tmp_path / "small", 1500, 64), processes=1)
    for words, delay_s in (
        (["data", "index", "set", "--processes", 2], 0.0),
        (["data", "index", "set", "--processes", 2], 0.4),
        (["data", "verify", "set", "--processes", 2], 0.4),
        (["data", "pack", "small", "out", "--jpeg", 90, "--shard-mb", 0.05, "--processes", 2], 0.4),
        (["bench", "step", "--ranks", 2, "--rounds", 9], 1.0),
    ):
        terminal = Terminal(*words, cwd=tmp_path)
        terminal.wait_for(lambda: len(processes(str(tmp_path))) >= 3)  # what it starts to do the work
        time.sleep(delay_s)
        terminal.ctrl_c()
        code, text = terminal.end()
        assert code == 130 and text.count("hpc-lbsgd: ended by Ctrl-C") == 1, text
    assert set(os.listdir(tmp_path)) <= {"out", "set", "small"}
    # finished pieces of an index may stay: the next one goes on from them
    assert not list((tmp_path / "set").glob("*.arrow")) and not list((tmp_path / "out").glob(".*.writing"))

"""Services that keep scalars: ones that hang, and the real W&B and MLflow where they are installed."""

import json
import os
import shutil
import struct
import subprocess
import time
from pathlib import Path

import pytest
from conftest import command, records

from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.records import Metrics, RunFolder
from hpc_lbsgd.train import services

EXAMPLE = Path(__file__).parents[2] / "docs/examples"
STANDIN = """
import os, signal, time
class Run:
    id = "abc"
    def log(self, values, step):
        with open(os.environ["PIDS"], "w") as file: file.write(str(os.getpid()))
        {log}
    def finish(self, exit_code): {finish}
def init(**words):
    {init}
    return Run()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A run's folder, and stand-ins beside it for the processes that services start."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path.cwd())]))
    monkeypatch.setenv("PIDS", str(tmp_path / "pids"))
    (tmp_path / "run").mkdir()
    return RunFolder(tmp_path / "run")


def stand_in(folder, init="pass", log="pass", finish="pass"):
    (folder.path.parent / "wandb.py").write_text(STANDIN.format(init=init, log=log, finish=finish))


def wait_for(path):
    deadline = time.monotonic() + 300
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)


@pytest.mark.parametrize(
    "log, said",
    [
        ("time.sleep(1000)", "wandb has not taken the rest in 1 s, and is left out; the run folder has the records"),
        ("os.kill(os.getpid(), signal.SIGKILL)", ""),
        ("raise OSError(28, 'No space left')", "wandb is left out from here on: OSError: [Errno 28] No space left"),
    ],
    ids=["hangs", "dies", "fails"],
)
def test_a_service_takes_nothing_from_the_run_that_it_keeps(folder, monkeypatch, capfd, log, said):
    stand_in(folder, log=log, finish="time.sleep(1000)")
    started = services.Services(["wandb"], folder, {})
    assert folder.read_loggers() == {"wandb": "abc"}
    monkeypatch.setattr(services, "END_S", 1.0)
    metrics = Metrics(folder, [started])
    metrics.write("epoch", step=1, epoch=0, loss=0.5)
    wait_for(folder.path.parent / "pids")  # it has been told
    for step in range(1000):  # more than a pipe holds
        metrics.write("event", step=step, event="x" * 100)
    metrics.close()
    started.close()
    assert said in capfd.readouterr().err
    pid = int((folder.path.parent / "pids").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize(
    "init, said",
    [
        ("time.sleep(1000)", "train.loggers = wandb: no answer in 1 s"),
        ("raise ConnectionError('nobody,\\n there')", "train.loggers = wandb: ConnectionError: nobody, there"),
        ("print('login?'); os._exit(3)", "train.loggers = wandb: its process has ended"),
    ],
)
def test_a_service_that_does_not_begin_is_refused(folder, monkeypatch, init, said):
    stand_in(folder, init=init)
    if "1 s" in said:
        monkeypatch.setattr(services, "START_S", 1.0)
    with pytest.raises(RequestError, match=said):
        services.Services(["wandb"], folder, {})


def test_a_service_ends_with_the_run_though_a_process_that_was_forked_holds_its_input(folder, capfd):
    stand_in(folder)
    started = services.Services(["wandb"], folder, {})
    holder = subprocess.Popen(["sleep", "1000"], pass_fds=[started.processes["wandb"].stdin.fileno()])
    metrics = Metrics(folder, [started])
    metrics.write("end", step=1, steps=1, status="done")
    metrics.close()
    started.close()
    holder.kill()
    holder.wait()
    assert capfd.readouterr().err == ""


# ---------------------------------------------------------------- the real ones

OWN = """
import os, signal, time

def slow(record, view):
    if record["kind"] == "step":
        time.sleep(0.02)  # so that a run takes longer than a second
    if record["kind"] == "step" and record["step"] == 13:
        view.stop()

def killed(record, view):
    slow(record, view)
    if record["kind"] == "step" and record["step"] == 78:
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A run with a growing batch that was stopped, resumed, killed after its last checkpoint, and resumed to its end;
    its folder, and what MLflow called its state each time."""
    for name in ("wandb", "mlflow"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    import mlflow

    here = tmp_path_factory.mktemp("kept")
    for name in ("own_code.py", "own_code.yaml"):
        shutil.copy(EXAMPLE / name, here)
    (here / "own_pace.py").write_text(OWN)
    mlflow.set_tracking_uri(f"sqlite:///{here}/ml.db")
    path = os.pathsep.join([str(here), str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
    env = {"PYTHONPATH": path, "WANDB_MODE": "offline", "MLFLOW_TRACKING_URI": f"sqlite:///{here}/ml.db"}
    words = ["own_code.yaml", "--run", "run", "--set", "train.loggers=[wandb,mlflow]", "--set", "machine.engine=torch"]
    few = ["--set", "train.eval_epochs=4"]  # and so steps after the last checkpoint to go back over
    states = []
    for more, code in (
        (["--set", "train.callbacks=[own_pace:slow]"], 75),
        (["--resume", "--set", "train.callbacks=[own_pace:killed]"], -9),
        (["--resume"], 0),
    ):
        done = command("train", *words, *few, *more, cwd=here, env=env)
        assert done.returncode == code, done.stderr
        deadline = time.monotonic() + 60  # a killed run's services tell the rest by themselves
        while (run := mlflow.search_runs(output_format="list")[0]).info.status == "RUNNING":
            assert time.monotonic() < deadline
            time.sleep(0.1)
        states.append(run.info.status)
    return here / "run", states, run


def told_wandb(run):
    """{name: [(step, value), ...]} of its offline files: LevelDB's log of protobuf records."""
    from wandb.proto.wandb_internal_pb2 import Record

    found: dict[str, list] = {}
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        data, at, whole = path.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if 32768 - at % 32768 < 7:
                at += 32768 - at % 32768
                continue
            size, part = struct.unpack("<HB", data[at + 4 : at + 7])
            whole += data[at + 7 : at + 7 + size]
            at += 7 + size
            if part in (1, 4):  # whole, or its last part
                record, whole = Record.FromString(whole), b""
                items = {"/".join(i.nested_key) or i.key: i.value_json for i in record.history.item}
                for name in (n for n in items if not n.startswith("_")):
                    found.setdefault(name, []).append((int(items["_step"]), json.loads(items[name])))
    return found


def test_wandb_and_mlflow_have_each_evaluation_once_whatever_became_of_the_run(kept):
    import mlflow

    run, states, theirs = kept
    assert states == ["KILLED", "FAILED", "FINISHED"]  # stopped, lost, done
    client = mlflow.MlflowClient()
    names = {
        n: [(m.step, m.value) for m in client.get_metric_history(theirs.info.run_id, n)] for n in theirs.data.metrics
    }
    for told in (names, told_wandb(run)):
        for name in ("loss", "accuracy", "margin", "worst_class"):
            assert told[f"eval/{name}"] == [(r["step"], r[name]) for r in records(run, "eval")], name
        assert told["epoch/loss"] == [(r["step"], r["loss"]) for r in records(run, "epoch")]
        steps = [step for step, _ in told["train/loss"]]
        assert steps == sorted(set(steps)) and len(steps) > 3
        here = {r["step"]: (r["loss"], r["global_batch"]) for r in records(run, "step")}
        assert told["train/loss"] == [(s, here[s][0]) for s in steps]
        assert told["train/global_batch"] == [(s, here[s][1]) for s in steps]
    assert theirs.data.params["optim.name"] == "own_code:Lion"
    resumes = [r["step"] for r in records(run, "event") if r["event"] == "resume"]
    assert {k for k in theirs.data.tags if k.startswith("event/")} == {f"event/resume/{step}" for step in resumes}
    assert [json.loads(text)["attempt"] for _, text in told_wandb(run)["event/resume"]] == [1, 2]


def test_no_process_of_theirs_outlives_a_run(kept):
    run = str(kept[0])
    commands = (p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if p.exists())
    assert not [c for c in commands if b"train.services" in c and run.encode() in c]

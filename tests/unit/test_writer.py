"""Checkpoints behind the steps: what is written is the step's own, and a write that fails or hangs is said."""

import threading
from types import SimpleNamespace

import pytest
import torch
from saves import replica

from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.errors import RunError
from hpc_lbsgd.records import RunFolder
from hpc_lbsgd.sections import Checkpoint
from hpc_lbsgd.theory.interval import checkpoint_interval_s, job_mtbf_s
from hpc_lbsgd.theory.schedule import Point
from hpc_lbsgd.train import checkpoint
from hpc_lbsgd.train.interval import Interval
from hpc_lbsgd.train.snapshot import HostCopy
from hpc_lbsgd.train.trainer import Trainer
from hpc_lbsgd.train.writer import Writer


@pytest.fixture
def disk(monkeypatch):
    """A disk whose syncs wait until `go` is set."""
    go, fsync = threading.Event(), checkpoint.os.fsync

    def slow(fd):
        assert go.wait(60)
        fsync(fd)

    monkeypatch.setattr(checkpoint.os, "fsync", slow)
    yield go
    go.set()


def state(step):
    return checkpoint.State(step, "recipe", "data", skipped=[0])


def test_what_is_written_is_what_was_there_at_the_step(tmp_path, disk):
    folder, model, now = RunFolder(tmp_path), replica(5), state(5)
    writer = Writer(folder, 2, 60.0, print)
    writer.save(model, now)
    model.model.state_dict()["w"].fill_(99.0)  # the next step, while the disk is slow
    now.skipped.append(5)
    now.step = 6
    assert writer.busy and writer.ended() is None and checkpoint.find_newest(folder) is None
    disk.set()
    saved = writer.wait()
    path, found, _ = checkpoint.find_newest(folder)
    assert (found.step, found.skipped, saved.step) == (5, [0], 5)
    assert saved.bytes == sum(f.stat().st_size for f in path.iterdir())
    weights = torch.load(path / "weights.pt", weights_only=True)
    assert type(weights) is dict and weights["w"].tolist() == [5.0] * 5
    assert writer.wait() is None and writer.ended() is None


def test_the_next_save_waits_for_the_one_under_way(tmp_path, disk):
    folder, events = RunFolder(tmp_path), []
    writer = Writer(folder, 2, 60.0, print, before=lambda: events.append("records"))
    writer.save(replica(1), state(1))

    def second():
        events.append(writer.save(replica(2), state(2)).step)

    thread = threading.Thread(target=second)
    thread.start()
    thread.join(0.3)
    assert thread.is_alive() and events == ["records"]
    disk.set()
    thread.join(60)
    assert writer.wait().step == 2 and checkpoint.find_newest(folder)[1].step == 2
    assert sorted(map(str, events)) == ["1", "records", "records"]


@pytest.mark.parametrize("problem", [OSError(28, "No space left on device"), ValueError("odd"), SystemExit("odd")])
@pytest.mark.parametrize("ask", ["wait", "ended", "save"])
def test_a_write_that_fails_is_said_once(tmp_path, monkeypatch, problem, ask):
    def fail(*_):
        raise problem

    monkeypatch.setattr(torch, "save", fail)
    writer = Writer(RunFolder(tmp_path), 2, 60.0, print)
    writer.save(replica(3), state(3))
    writer.join()
    with pytest.raises(RunError, match=r"checkpoint at step 3 not written: .*(space|odd).* --resume"):
        writer.save(replica(4), state(4)) if ask == "save" else getattr(writer, ask)()
    assert writer.wait() is None


def test_a_write_that_hangs_is_named(tmp_path, disk):
    said, heard = [], threading.Event()

    def stuck(message):
        said.append(message)
        heard.set()

    writer = Writer(RunFolder(tmp_path), 2, 0.1, stuck)
    writer.save(replica(3), state(3))
    assert heard.wait(60) and writer.busy
    assert "checkpoint of step 3 is not written after 0.1 s" in said[0] and str(tmp_path / "checkpoints") in said[0]
    disk.set()
    writer.wait()
    assert len(said) == 1


def test_a_bad_step_waits_for_the_write_as_for_a_checkpoint(tmp_path):
    """It may take longer than any step: another phase's limit would end the job as one that stalled."""
    phases, told = [], []
    trainer = Trainer.__new__(Trainer)
    trainer.recipe, trainer.state, trainer.hosts, trainer.lead = recipes.Recipe(), state(5), ["here"], True
    trainer.engine = SimpleNamespace(rank=0, size=1, share=lambda verdict: verdict)
    trainer.folder, trainer.journal = RunFolder(tmp_path), SimpleNamespace(event=lambda *_, **__: None)
    trainer.watchdog = SimpleNamespace(enter=lambda phase, _: phases.append(phase))
    trainer.writer = Writer(trainer.folder, 1, 60.0, told.append)
    trainer.writer.join = lambda: phases.append("joined")
    trainer._give_up = told.append
    bad = SimpleNamespace(bad_ranks=1, bad_rank=0)
    trainer._pass_over(Point(5, 0, 5, 0.1, 0.9, workers=1, samples_per_worker=8, first=0, count=8), bad)
    assert phases == ["checkpoint", "joined"] and "no checkpoint was written yet" in told[0]


def test_ranks_that_all_leave_do_not_watch_one_another_while_one_waits_for_its_write():
    seen = []
    trainer = Trainer.__new__(Trainer)
    trainer.state, trainer.stepper = state(5), None
    trainer.watchdog = SimpleNamespace(stop=lambda: seen.append("stopped"), enter=lambda phase, _: seen.append(phase))
    trainer.journal = SimpleNamespace(flush=lambda: None)
    trainer.writer = SimpleNamespace(wait=lambda: seen.append("waited"))
    trainer._prepare = lambda: None
    for everywhere, expected in ((True, ["stopped", "checkpoint", "waited"]), (False, ["checkpoint", "waited"])):
        seen.clear()

        def fail(everywhere=everywhere):
            raise RunError("odd", everywhere=everywhere)

        trainer._train = fail
        with pytest.raises(RunError, match="odd"):
            trainer.run()
        assert seen == expected


def test_a_reader_finds_the_newest_of_a_run_that_goes_on(tmp_path, monkeypatch):
    """Those that it listed are pruned while it reads them."""
    folder, read_whole = RunFolder(tmp_path), checkpoint.read_whole
    checkpoint.save(folder, replica(1), state(1), 1)

    def read(path):
        if path.name == checkpoint.name_of(1):
            checkpoint.save(folder, replica(2), state(2), 1)
        return read_whole(path)

    monkeypatch.setattr(checkpoint, "read_whole", read)
    path, found, problems = checkpoint.find_newest(folder)
    assert (path.name, found.step, problems) == (checkpoint.name_of(2), 2, [])


def test_memory_is_used_again_and_keeps_the_layout():
    model, memory = replica(1), HostCopy()
    model.model.state_dict()["w"] = torch.ones(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    first = memory.take(model, state(1)).tensors["weights"]["w"]
    second = memory.take(model, state(2)).tensors["weights"]["w"]
    assert first.data_ptr() == second.data_ptr() != model.model.state_dict()["w"].data_ptr()
    assert first.is_contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------- how often


@pytest.mark.parametrize("cost_s, mtbf_s, interval_s", [
    (0.0, 3600.0, 0.0),
    (2.0, 3600.0, 120.0),  # sqrt(2 * 2 * 3600)
    (300.0, 86400.0, 7200.0),  # Daly's range: 5 minutes, a day
    (0.05, 18e6, 1341.640786),
    (5.0, 10.0, 10.0),  # where sqrt would pass the time between failures
    (100.0, 10.0, 10.0),
])  # fmt: skip
def test_youngs_and_dalys_interval(cost_s, mtbf_s, interval_s):
    assert checkpoint_interval_s(cost_s, mtbf_s) == pytest.approx(interval_s)


@pytest.mark.parametrize("cost_s, mtbf_s", [(-1.0, 1.0), (1.0, 0.0)])
def test_an_interval_of_nothing_is_refused(cost_s, mtbf_s):
    with pytest.raises(ValueError, match="at least 0"):
        checkpoint_interval_s(cost_s, mtbf_s)


def test_failures_of_nodes_add():
    assert job_mtbf_s(5000.0, 1) == 18e6 and job_mtbf_s(5000.0, 32) == 562_500.0


def test_auto_measures_first_and_never_waits_for_the_disk():
    interval = Interval(Checkpoint(minutes="auto", mtbf_hours=1.0), nodes=1)
    assert interval.due(0.001, busy=False) and not interval.due(0.001, busy=True)
    for stall_s in (30.0, 2.0, 2.0):  # the first one makes the memory
        interval.measured(stall_s)
    assert interval.seconds() == 120.0
    assert not interval.due(119.0, busy=False) and interval.due(121.0, busy=False)
    assert not interval.due(121.0, busy=True)
    interval.nodes = 4
    assert interval.seconds() == 60.0


def test_minutes_are_minutes():
    assert Interval(Checkpoint(minutes=2.0)).due(121.0, busy=True) and not Interval(Checkpoint()).due(1e9, busy=False)


def test_ranks_watch_one_another_until_the_last_has_met_the_others(tmp_path):
    """Whoever hangs or stops in the end holds up the others as in a step; what rank 0 does alone may take long."""
    phases, met = [""], []
    trainer, folder = Trainer.__new__(Trainer), RunFolder(tmp_path)

    def meets(what, result=None):
        return lambda *_: (met.append((what, phases[-1])), result)[1]

    trainer.state, trainer.lead, trainer.folder, trainer.last_eval = state(5), True, folder, {}
    trainer.watchdog = SimpleNamespace(stop=lambda: None, enter=lambda phase, _: phases.append(phase))
    trainer.writer = SimpleNamespace(wait=meets("write"))
    model = torch.nn.Linear(1, 1)
    trainer.replica = SimpleNamespace(check_others=meets("others"), check_equal=meets("equal"), model=model)
    trainer.engine = SimpleNamespace(size=2, barrier=meets("barrier"), share=meets("fault", (None, False)))
    trainer.journal = SimpleNamespace(
        asked=lambda: (None, False), write=lambda *_, **__: meets("callbacks")(), close=meets("close")
    )
    assert trainer._end(False, 1.0) == 0
    assert met[:4] == [("write", "checkpoint"), ("others", "sum"), ("equal", "sum"), ("fault", "sum")]
    assert met[4:] == [("callbacks", "closing"), ("barrier", "sum"), ("fault", "sum"), ("close", "end")]

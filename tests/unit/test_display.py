"""What people see of a run: on a terminal, in a log, in TensorBoard."""

import io

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hpc_lbsgd.theory.schedule import Schedule, Stage, Warmup
from hpc_lbsgd.train.display import Display
from hpc_lbsgd.train.loggers import Loggers, TensorBoard


def step(number, **more):
    return {"kind": "step", "step": number, "epoch": 0, "loss": 1.0, "lr": 0.1, "global_batch": 8, "samples": 8,
            "images_per_s": 80.0, "data_wait_s": 0.0, "exposed_comm_s": 0.0, "step_s": 0.1, **more}  # fmt: skip


def test_tensorboard_has_every_rare_record_and_not_every_step(tmp_path):
    board = Loggers([TensorBoard(tmp_path)])
    for i in range(300):  # ten a second
        more = ({"noise_scale": float(i)} if i % 100 == 0 else {}) | ({"skipped": True} if i == 7 else {})
        board(step(i, time=f"2026-11-29T22:00:{i // 10:02d}.{i % 10}00+00:00", **more))
    board({"kind": "eval", "step": 300, "loss": 0.5, "accuracy": None, "samples": 8})
    board({"kind": "event", "time": "now", "event": "decision", "step": 200, "workers": 4})
    board.close()
    found = EventAccumulator(str(tmp_path)).Reload()
    assert [e.step for e in found.Scalars("train/noise_scale")] == [0, 100, 200]
    assert [e.step for e in found.Scalars("train/skipped")] == [7]
    assert [e.step for e in found.Scalars("train/loss")] == list(range(0, 300, 10))
    assert [e.value for e in found.Scalars("eval/loss")] == [0.5]
    text = found.Tensors("event/decision/text_summary")[0]
    assert text.step == 200 and b"workers" in text.tensor_proto.string_val[0]


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_a_bar_fits_its_terminal(columns, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("COLUMNS", str(columns))
    stream = Terminal()
    display = Display(schedule(), 0, 1, stream)
    display.bar.ncols, display.bar.dynamic_ncols = columns, None  # as tqdm asks a real one
    for i in range(20):
        display(step(i))
    display.bar.refresh()
    display.close()
    drawn = [part for part in stream.getvalue().replace("\r", "\n").split("\n") if part.strip()]
    assert max(map(len, drawn)) <= columns
    assert "ETA 0:00:" in drawn[-1] and ("kn 8" in drawn[-1]) is (columns > 80)


def schedule(**more):
    return Schedule(80, 8, [Stage(0, 1, 0.1, 0.9), Stage(2, 5, 0.1, 0.9)], 4, "partial", Warmup(0, 0.1), **more)


def test_an_eta_knows_of_growing_batches_and_of_evaluations(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    out = io.StringIO()
    display = Display(schedule(), 0, 2, out)  # 80 images an epoch, evaluated every other
    for i in range(20):
        now[0] += 0.1
        display(step(i, epoch=i // 10))
    now[0] += 30
    display({"kind": "eval", "step": 20, "epoch": 2, "loss": 1.0, "accuracy": 0.5, "samples": 8})
    now[0] += 100
    display(step(20, epoch=2, global_batch=40, samples=40, step_s=0.5))
    # 120 of 320 images at 80 a second, and one evaluation of 30 s
    assert "ETA 0:00:31" in out.getvalue().splitlines()[-1]


def test_samples_ahead_are_those_of_the_steps_that_are_left():
    for made in (
        schedule(),
        schedule(max_steps=17),
        Schedule(83, 8, [Stage(0, 2, 0.1, 0.9)], 3, "partial", Warmup(0, 0.1)),
    ):
        points = [made.at(s) for s in range(made.steps)]
        assert [made.samples_ahead(s) for s in range(made.steps + 1)] == [
            sum(p.count for p in points[s:]) for s in range(made.steps + 1)
        ]

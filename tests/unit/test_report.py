"""`report` and `watch` on records as runs write them: right numbers, no matter how a run went."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from conftest import SMALL_RECIPE, changed, command

from hpc_lbsgd import recipe
from hpc_lbsgd.cluster.resume import ranks_of
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.owner import take
from hpc_lbsgd.records import RunFolder
from hpc_lbsgd.report import compare as comparing
from hpc_lbsgd.report import curves, page
from hpc_lbsgd.report import facts as reading
from hpc_lbsgd.report.watch import Live, lines, sparkline
from hpc_lbsgd.tail import Tail

N, KN = 203, 128


def line(second, kind, **fields):
    return json.dumps({"kind": kind, "time": f"2026-01-01T00:{second // 60:02d}:{second % 60:02d}.000+00:00", **fields})


def step(second, number, **more):
    count = N % KN if number % 2 else KN
    fields = {"loss": 2.0 / (number + 1), "lr": 0.1, "momentum": 0.9, "global_batch": KN, "samples": count}
    times = {"step_s": 1.0, "data_wait_s": 0.25, "exposed_comm_s": 0.125, "images_per_s": count}
    return line(second, "step", step=number, epoch=number // 2, **(fields | times | more))


def make(path, records, status=None, **keys):
    folder = RunFolder(path)
    path.mkdir(parents=True)
    content = changed(SMALL_RECIPE, data__samples=N, data__classes=4, **keys)
    folder.recipe.write_text(recipe.validate(content).to_yaml())
    folder.metrics.write_text("\n".join(records) + "\n")
    hosts = [{"host": h, "device": "cpu"} for h in ("a", "a", "b")]
    folder.environment.write_text(json.dumps([{"attempt": 0, "ranks": hosts[:2]}, {"attempt": 1, "ranks": hosts}]))
    if status:
        folder.write_status(status)
    return folder


@pytest.fixture
def run(tmp_path):
    """4 steps on 2 ranks, stopped after a checkpoint, 2 more on 3 ranks."""
    begin = {"engine": "horovod", "device": "cpu", "global_batch": KN, "workers": 16}
    return make(
        tmp_path / "first <run>",
        [
            line(0, "start", step=0, attempt=0, ranks=2, **begin),
            *(step(1 + i, i) for i in range(4)),
            line(7, "eval", step=4, epoch=2, loss=1.0, accuracy=0.5, samples=61),
            line(9, "checkpoint", step=4, path="x", seconds=2.0, stall_s=1.5, bytes=9),
            line(60, "start", step=4, attempt=1, ranks=3, start_s={"imports": 1.5, "engine": 0.5}, **begin),
            line(60, "event", event="resume", attempt=1, step=4, checkpoint="<b>x</b>"),
            step(62, 4, noise_scale=50.0, noise_scale_low=40.0, noise_scale_high=70.0, images_per_s=300.0),
            step(63, 5, loss=None),
            line(64, "eval", step=6, epoch=3, loss=0.9, accuracy=0.75, samples=61),
            line(64, "end", step=6, steps=6, status="done", weights_sha256="ab", seconds=4),
        ],
        "done",
    )


def test_time_is_booked_on_what_took_it(run):
    found = reading.facts(str(run.path))
    assert found.seconds == {"start-up": 2.0, "data": 1.5, "sums": 0.75, "compute": 3.75, "evaluation": 4.0,
                             "checkpoint": 1.5, "other": 1.5}  # fmt: skip
    # the hour between two starts is nobody's; two nodes count twice
    assert found.node_hours == pytest.approx((9 * 1 + 4 * 2) / 3600)
    assert found.seams == [4] and found.accuracy == 0.75 and found.images_per_s == pytest.approx((300 + N % KN) / 2)


def test_curves_run_over_epochs_whatever_the_batch(run):
    found = reading.facts(str(run.path))
    assert found.epochs(found.steps) == pytest.approx([KN / N, 1, 1 + KN / N, 2, 2 + KN / N, 3])
    assert found.epochs(found.evaluations) == [2, 3]


def test_many_steps_are_averaged_and_keep_their_mean():
    xs, ys = reading.thin(range(100_000), [float(i % 7) for i in range(100_000)])
    assert len(xs) == len(ys) <= 600 and sum(ys) / len(ys) == pytest.approx(3.0, abs=0.01)
    assert reading.thin([1, 2, 3], [None, float("nan"), 5.0]) == ([3.0], [5.0])


@pytest.mark.parametrize("name", ["_hidden", r"$\foo$", "$x^2$", "a$b", "<i>&amp;", "g%d{}"])
def test_a_run_of_any_name_has_its_curve_named(tmp_path, name):
    begin = line(0, "start", step=0, attempt=0, ranks=1)
    runs = [reading.facts(str(make(tmp_path / n, [begin, step(1, 0), step(2, 1)]).path)) for n in (name, "other")]
    drawn = next(d for d in page.drawings(runs, (), curves.INK) if d.name == "loss")
    figure = ElementTree.fromstring(drawn.canvas.svg("loss"))
    assert name in ["".join(e.itertext()).strip() for e in figure.iter() if e.tag.endswith("text")]


def test_a_page_of_many_steps_stays_small(tmp_path):
    noise = {"noise_scale": 50.0, "noise_scale_low": None, "noise_scale_high": 60.0}
    steps = [step(i % 3600, i, **{**noise, "noise_scale": 50.0 + i % 13}) for i in range(20_000)]
    folder = make(tmp_path / "long", [line(0, "start", step=0, attempt=0, ranks=1), *steps])
    assert page.report([str(folder.path)]).stat().st_size < 500_000


def test_a_page_says_it_all_and_lets_nothing_through(run):
    out = page.report([str(run.path)])
    text = out.read_text()
    assert out == run.path / "report.html"
    assert "<b>x</b>" not in text and "first <run>" not in text and "first &lt;run&gt;" in text
    assert not re.search(r'(src|href)="(?!#)', text), "it needs nothing else"
    figures = re.findall(r"<svg .+?</svg>", text, re.S)
    assert len(figures) == 7
    ids = []
    for figure in figures:
        tree = ElementTree.fromstring(figure)
        ids += [e.get("id") for e in tree.iter() if e.get("id")]
    assert len(ids) == len(set(ids)), "two figures share an id, and one would be drawn with the other's marks"
    assert "evaluation: 27% of the time" in text and "75.00%" in text


def test_several_runs_lie_over_one_another(run, tmp_path):
    for kn, accuracy in ((64, 0.8), (64, 0.9), (128, 0.7)):
        name = tmp_path / f"runs-{kn}-{accuracy}" / "same-name"
        begin = line(0, "start", step=0, attempt=0, ranks=kn // 32, engine="torch", device="cpu")
        records = [begin, step(1, 0, global_batch=kn, images_per_s=kn * 10.0),
                   line(2, "eval", step=1, epoch=1, loss=1.0, accuracy=accuracy, samples=61)]  # fmt: skip
        make(name, records, seed=int(accuracy * 10))
    names = [str(p) for p in sorted(tmp_path.glob("runs-*/same-name"))]
    runs = page.distinct([reading.facts(n) for n in names])
    assert [r.name for r in runs] == ["/".join(Path(n).parts[-2:]) for n in names]
    assert reading.by_batch(runs) == [
        (64, pytest.approx(0.15), pytest.approx(0.0707, abs=1e-4), 2),
        (128, pytest.approx(0.3), 0.0, 1),
    ]
    other = dataclasses.replace(runs[0], recipe=runs[0].recipe | {"optim": {"base_lr": 9.0}})
    assert [row[3] for row in reading.by_batch([*runs, other])] == [2, 1, 1], "another learning rate is no spread"
    assert reading.by_ranks(runs) == [(2, 640.0, 1.0), (4, 1280.0, 1.0)]
    out = page.report([str(run.path), *names], tmp_path / "all.html", tmp_path / "figures", "svg")
    assert {"scaling.svg", "error.svg", "loss.svg"} <= {p.name for p in (tmp_path / "figures").iterdir()}
    assert [key for key, _ in page.differences(runs)] == ["seed"] and "no end on record" in out.read_text()


@pytest.mark.parametrize("records", [[], ["{"], [line(0, "start", step=0, attempt=0, ranks=1)]])
def test_a_run_that_has_hardly_begun_has_a_page_and_a_view(tmp_path, records):
    folder = make(tmp_path / "new", records)
    assert page.report([str(folder.path)]).exists()
    held = take(folder.path)
    live = Live(folder)
    live.look()
    assert live.facts()["status"] == "running" and lines(live.facts(), [], 80)
    held.release()


DIES = """
import os, sys
from hpc_lbsgd.owner import take
take(sys.argv[1])
os.kill(os.getpid(), 9)
"""


def test_a_view_ends_where_the_run_was_killed(tmp_path):
    """Nobody wrote how it ended; its lease says whose it was."""
    folder = make(tmp_path / "run", [line(0, "start", step=0, attempt=0, ranks=1), step(1, 0)], None)
    subprocess.run([sys.executable, "-c", DIES, str(folder.path)])
    assert (folder.path / "owner.json").exists()
    shown = command("watch", folder.path, timeout=60)
    assert shown.returncode == 0 and shown.stdout.startswith("no end on record  step 1/"), shown.stdout
    once = command("watch", folder.path, "--once").stdout
    assert "it was killed; go on with hpc-lbsgd resume" in once
    assert (folder.path / "owner.json").exists()  # a look changes nothing
    held = take(folder.path)  # the next start
    assert json.loads(command("watch", folder.path, "--json").stdout)["status"] == "running"
    held.release()
    folder.write_status("done")
    assert json.loads(command("watch", folder.path, "--json").stdout)["status"] == "done"


def test_what_is_no_run_is_refused(tmp_path):
    for words in (["report", tmp_path], ["watch", tmp_path, "--once"]):
        done = command(*words)
        assert done.returncode == 2 and str(tmp_path) in done.stderr and done.stderr.count("\n") == 1
    with pytest.raises(RequestError, match="cannot be written"):
        page.report([str(make(tmp_path / "r", [], None).path)], tmp_path / "none" / "x.html")


def test_a_scaling_study_is_reported_alone_and_beside_runs(run, tmp_path):
    few = {"global_batch": 64, "images_per_s": 900.0, "data_wait_share": 0.01, "exposed_comm_share": 0.031, "rounds": 5}
    few |= {"slowest_rank": 1, "slowest_host": "<node>", "slowest_over_median": 0.02}
    rows = [
        {"mode": mode, "ranks": n, "nodes": n, "efficiency": e, "efficiency_low": e - 0.1, "efficiency_high": e} | few
        for mode in ("weak", "strong")
        for n, e in ((1, 1.0), (2, 0.875))
    ]
    result = {"recipe": "r.yaml", "machine": "cpu", "engine": "horovod", "data": None, "baseline": "1 rank"}
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "results.json").write_text(json.dumps(result | {"missing_ranks": [4], "rows": rows}))
    alone = page.report([str(tmp_path / "sweep")], figures=tmp_path / "files")
    text = alone.read_text()
    assert alone == tmp_path / "sweep" / "report.html" and (tmp_path / "files" / "study-1.png").stat().st_size > 5000
    for said in ("no result on 4 ranks", "87.5%", "77.5% – 87.5%", "&lt;node&gt;", "Scaling study sweep"):
        assert said in text
    assert 'id="runs"' not in text and 'id="time"' not in text
    both = page.report([str(run.path), str(tmp_path / "sweep")], tmp_path / "both.html").read_text()
    assert 'id="runs"' in both and "Scaling study sweep" in both
    (tmp_path / "sweep" / "results.json").write_text('{"rows": [{}]}')
    with pytest.raises(RequestError, match="no results of bench scaling.*--report"):
        page.report([str(tmp_path / "sweep")])


def test_a_view_fits_its_columns_and_knows_what_is_left(run):
    live = Live(run)
    live.look()
    run.status_file.unlink()  # as while it goes
    take(run.path)
    found = live.facts()
    # capped at 20 steps: 14 more, 7 epochs of 203 images
    assert (found["step"], found["steps"], found["epochs"]) == (6, 20, 10)
    assert found["eta_s"] == pytest.approx(7 * N / (3 * N / 6))
    assert found["data_wait_share"] == 0.25 and found["noise_scale"] == 50.0 and found["best_accuracy"] == 0.75
    for width in (40, 80, 200):
        view = lines(found, list(live.losses), width)
        assert max(map(len, view)) <= width and any("ETA 0:00:14" in v for v in view)
        name, place = "/scratch/me/runs/goyal-resnet50-20260101-120000", {"step": 112_000, "steps": 112_600}
        long = lines(found | place | {"run": name, "eta_s": 36_000.0}, [], width)
        assert "running" in long[0] and "-120000" in long[0] and "ETA 10:00:00" in long[1], long


def test_a_growing_file_is_read_once_and_again_where_a_resume_cut_it(tmp_path):
    path, tail = tmp_path / "metrics.jsonl", Tail(tmp_path / "metrics.jsonl")

    def seen():
        return [r["step"] for r in tail()]

    assert seen() == []
    path.write_text('{"kind": "x", "step": 1}\n{"kind": "x", "step": 2}\n{"kind"')
    assert seen() == [1, 2]
    with path.open("a") as file:
        file.write(': "x", "step": 3}\n')
    assert seen() == [3] and seen() == []
    path.write_text('{"kind": "x", "step": 1}\n')
    assert seen() == [1]


def test_a_sparkline_goes_from_the_lowest_to_the_highest():
    assert (
        sparkline([0.0, 1.0], 10) == "▁█"
        and sparkline([3.0, 3.0], 10) == "▁▁"
        and len(sparkline([1.0] * 999, 60)) <= 60
    )


def test_the_recipe_on_the_page_is_the_run_s(run):
    text = page.report([str(run.path)]).read_text()
    assert yaml.safe_load(run.recipe.read_text())["seed"] == 7 and "seed: 7" in text


def test_a_view_of_a_run_that_went_back_starts_again(tmp_path):
    """A resume replaces the file; it may be longer than before at the next look."""
    begin = line(0, "start", step=0, attempt=0, ranks=2)
    decision = line(3, "event", event="decision", step=4, epoch=2, workers=20, lr=0.2)
    first = [begin, *(step(1 + i, i) for i in range(5)), decision, line(8, "eval", step=5, epoch=2, loss=1, accuracy=1)]
    folder = make(tmp_path / "run", first, batch__last_batch="drop", schedule={"kind": "adaptive-batch"})
    live = Live(folder)
    live.look()
    assert live.facts()["best_accuracy"] == 1
    whole = [begin, *(step(1 + i, i) for i in range(4)), line(9, "start", step=4, attempt=1, ranks=2),
             decision, *(step(9 + i, 4 + i) for i in range(9))]  # fmt: skip
    (tmp_path / "new").write_text("\n".join(["3", "[]", *whole]) + "\n")
    (tmp_path / "new").rename(folder.metrics)
    live.look()
    assert live.facts()["step"] == 13 and live.facts()["best_accuracy"] is None
    assert live.decisions == [[2, 20, 0.2]] and len(live.recent) == 13


@pytest.mark.parametrize("environment", ['{"a": 1}', "[1]", "[{}]", "["])
def test_what_is_not_whole_is_left_out(run, environment):
    """Records of other versions and damaged files: a page and a view tell the rest."""
    run.environment.write_text(environment)
    with run.metrics.open("a") as file:
        for kind in ("start", "step", "eval", "event", "checkpoint", "end"):
            file.write(json.dumps({"kind": kind, "step": 3}) + "\n" + json.dumps({"kind": kind}) + "\n")
    assert page.report([str(run.path)]).exists() and reading.facts(str(run.path)).accuracy == 0.75
    live = Live(run)
    live.look()
    assert live.facts()["step"] == 6 and lines(live.facts(), [], 80)
    assert comparing.compare(str(run.path), str(run.path))["first_difference"] is None
    assert ranks_of(run) == 1


def test_runs_without_a_step_in_common_are_not_called_the_same(tmp_path):
    begin = line(0, "start", step=0, attempt=0, ranks=1)
    runs = {"none": [begin], "first": [begin, step(1, 0), step(2, 1)], "later": [begin, step(1, 1), step(2, 2)]}
    for name, found in runs.items():
        make(tmp_path / name, found)

    def said(a, b):
        return comparing.show(comparing.compare(str(tmp_path / a), str(tmp_path / b)))

    assert "steps: none that both have: nothing is compared (A has 0, B 2)" in said("none", "first")
    assert "steps: all 1 that both have are the same" in said("first", "later")


@pytest.mark.parametrize(
    "script, said",
    [
        ("echo RUNNING 1:00", "job 7: RUNNING, 1:00 left"),
        ("", "job 7: not in the queue"),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", "job 7: not in the queue"),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", "job 7: Slurm does not answer"),
        ("echo RUNNING; echo PENDING", "job 7: RUNNING; PENDING"),  # an array, as older runs wrote it down
    ],
)
def test_watch_tells_a_job_that_is_gone_from_a_controller_that_is_away(tmp_path, monkeypatch, script, said):
    (tmp_path / "recipe.yaml").touch()
    (tmp_path / "environment.json").write_text(json.dumps([{"scheduler": "slurm", "job_id": "7"}]))
    (tmp_path / "squeue").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert Live(RunFolder(tmp_path)).job() == said


def test_a_task_of_an_array_is_written_down_as_itself(monkeypatch):
    """The array's last task has the array's number, by which squeue means all of them."""
    from hpc_lbsgd.train.environment import software_facts

    for name, value in (("JOB_ID", "7"), ("ARRAY_JOB_ID", "7"), ("ARRAY_TASK_ID", "3")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    facts = software_facts()
    assert (facts["scheduler"], facts["job_id"]) == ("slurm", "7_3")


def test_each_of_many_runs_has_a_look_of_its_own(tmp_path):
    """The eighth had the first one's colour."""
    evaluation = line(3, "eval", step=2, epoch=1, loss=1.0, accuracy=0.5, ema_accuracy=0.6, samples=61)
    runs = [
        reading.facts(str(make(tmp_path / f"run-{i:02d}", [step(1, 0), step(2, 1), evaluation]).path))
        for i in range(16)
    ]
    for draw in (curves.loss, curves.accuracy):
        drawn = [x for x in draw(runs, curves.INK).axis.get_lines() if x.get_label().strip().startswith("run-")]
        looks = {(x.get_color(), str(x._unscaled_dash_pattern), x.get_linewidth()) for x in drawn}
        assert len(looks) == len(drawn) >= 16
    assert len({curves.colour(i) for i in range(14)}) == 14

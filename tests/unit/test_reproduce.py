"""Which runs make a table, and what is made of what they measured. Runs here are written by hand."""

import json
import math

import pytest

from hpc_lbsgd.records import RunFolder
from hpc_lbsgd.reproduce import plots, table
from hpc_lbsgd.reproduce.cells import cells_of, cut_short, read_result
from hpc_lbsgd.reproduce.experiments import EXPERIMENTS, SCALES, Row, table1
from hpc_lbsgd.reproduce.runner import Pace
from hpc_lbsgd.theory.scaling import noise_scale

SMALL = SCALES["small"]


def write_run(cell, errors, steps=40, losses=None, batch=64, noise=(), status="done"):
    """What `train` would have left: one evaluation an epoch."""
    folder = cell.folder
    folder.path.mkdir(parents=True)
    lines = []
    per_epoch = max(1, steps // max(1, len(errors)))
    measured = {step: (t, s) for step, t, s in noise}
    for step in range(steps):
        extra = {}
        if step in measured:
            extra = dict(zip(("noise_trace", "noise_square"), measured[step], strict=True))
        loss = losses[step] if losses else 1.0
        lines.append({"kind": "step", "step": step, "loss": loss, "global_batch": batch, "step_s": 0.1, **extra})
        epoch, rest = divmod(step + 1, per_epoch)
        if rest == 0 and epoch <= len(errors):
            accuracy = 1 - errors[epoch - 1] / 100
            lines.append({"kind": "eval", "step": step + 1, "epoch": epoch, "accuracy": accuracy})
    if status == "failed":
        lines.append({"kind": "event", "event": "non-finite", "step": steps})
    folder.metrics.write_text("".join(json.dumps(x) + "\n" for x in lines))
    folder.write_status(status)


def small_cells(rows, tmp_path, seeds=2):
    return cells_of(rows, seeds, [], tmp_path)


@pytest.mark.parametrize("scale", list(SCALES))
@pytest.mark.parametrize("name", list(EXPERIMENTS))
def test_every_experiment_is_valid_recipes_at_every_scale(name, scale, tmp_path):
    rows = EXPERIMENTS[name].rows(SCALES[scale])
    cells = cells_of(rows, 1, [], tmp_path)
    assert len({r.label for r in rows}) == len(rows)
    assert len({c.folder.path for c in cells}) == len(cells), "two rows of one table are the same run"
    for cell in cells:
        assert cell.recipe.build_schedule(cell.recipe.data.samples).steps > 0


def test_tables_share_runs_and_seeds_do_not(tmp_path):
    folders = {}
    for name in ("goyal-table1", "goyal-table2a", "goyal-table2b", "goyal-figure1"):
        for cell in cells_of(EXPERIMENTS[name].rows(SMALL), 2, [], tmp_path):
            folders.setdefault(cell.folder.path, set()).add((name, cell.row.label))
    baseline = next(labels for labels in folders.values() if ("goyal-table1", "baseline") in labels)
    assert {name for name, _ in baseline} == {"goyal-table1", "goyal-table2a", "goyal-table2b", "goyal-figure1"}
    first, second = (c.folder.path for c in cells_of(table1(SMALL)[:1], 2, [], tmp_path))
    assert first != second
    (other,) = cells_of(table1(SMALL)[:1], 1, ["data.train=elsewhere"], tmp_path)
    assert other.folder.path != first


@pytest.mark.parametrize("scale", ["small", "cifar10"])
def test_smiths_rows_start_at_one_noise_scale(scale, tmp_path):
    """Smith et al. 2018: raised learning rate, batch and momentum leave lr * N / (B * (1 - m)) as it was."""
    scales = set()
    for cell in cells_of(EXPERIMENTS["smith-momentum"].rows(SCALES[scale]), 1, [], tmp_path):
        stage = cell.recipe.build_schedule(cell.recipe.data.samples).stages[0]
        batch = stage.workers * cell.recipe.batch.samples_per_worker
        scales.add(round(noise_scale(stage.lr, stage.momentum, batch, cell.recipe.data.samples), 6))
    assert len(scales) == 1


def test_error_is_the_median_of_the_last_five_epochs_over_seeds(tmp_path):
    cells = small_cells(table1(SMALL)[:1], tmp_path)
    write_run(cells[0], [50, 12, 10, 11, 90, 10], 60)
    write_run(cells[1], [50, 14, 12, 13, 13, 12], 60)
    line = table.line_of(cells)
    assert line.errors == pytest.approx([11, 13]) and line.error == pytest.approx(12)
    assert line.std == pytest.approx(math.sqrt(2)) and line.diverged == 0
    assert line.curve["mean"][0] == pytest.approx(50) and line.curve["std"][4] == pytest.approx(77 / math.sqrt(2))


def test_a_run_that_diverged_is_a_result_and_a_crash_is_not(tmp_path):
    cells = small_cells(table1(SMALL)[:1], tmp_path)
    write_run(cells[0], [50, 40], 20, status="failed")
    assert cells[0].finished and cells[0].diverged_at == 20 and read_result(cells[0]).error is None
    cells[1].folder.path.mkdir(parents=True)
    cells[1].folder.write_status("failed", error="out of memory")
    assert not cells[1].finished
    cells[1].folder.write_status("stopped")
    assert not cells[1].finished


def test_the_break_point_is_the_first_batch_that_never_comes_back(tmp_path):
    def line(batch, error, std=0.1, diverged=0):
        return table.Line("", batch, batch, 0.1, 0.9, 1, 3, diverged, error, std, "", [], [])

    lines = [line(32, 10.0), line(64, 10.1), line(128, 10.9), line(256, 10.1), line(512, 11), line(1024, None, None, 3)]
    assert table.break_point(lines, 32).batch == 512
    assert table.break_point(lines[:4], 32) is None
    assert table.break_point([line(16, 12), line(32, 10), line(64, 10.15)], 32) is None


def test_steps_to_a_loss_average_over_enough_examples(tmp_path):
    (cell,) = small_cells(table1(SMALL)[:1], tmp_path, seeds=1)
    losses = [2.0 if i < 50 else 0.5 for i in range(100)]
    losses[10] = 0.0  # one lucky step is no arrival
    write_run(cell, [], 100, losses, batch=64)
    steps, examples = table.steps_to(cell.result, 0.5)
    assert steps == 82 and examples == 82 * 64  # 32 steps of 64 are the window of 2,048
    assert table.steps_to(cell.result, 0.4) is None
    assert table.steps_to(cell.result, 1.25)[0] == 66


def test_tradeoff_finds_the_frontier_it_was_given(tmp_path):
    """Runs made after S = S_min (1 + B_crit/B) with B_crit = 200: the report says so, and names the ratio."""
    s_min, critical, rows = 50, 200, []
    for k in (1, 2, 4, 8, 16, 32):
        for lr in (0.1, 0.2):
            settings = {"batch.workers": k, "optim.base_lr": lr}
            rows.append(Row(f"k = {k}, lr {lr}", "reproduce-small", settings, ""))
    cells = small_cells(rows, tmp_path)
    for cell in cells:
        batch = 32 * cell.recipe.batch.workers
        steps = round(s_min * (1 + critical / batch) * (1.0 if cell.recipe.optim.base_lr == 0.2 else 1.5))
        arrived = steps - math.ceil(2048 / batch)  # the window is full of low losses at `steps`
        losses = [2.0] * arrived + [0.59] * (steps + 20 - arrived)
        write_run(cell, [], len(losses), losses, batch, noise=[(5, 300.0, 1.0), (6, 500.0, 1.0)])
    report = table.summarise(EXPERIMENTS["mccandlish-tradeoff"], SMALL, cells, 2)
    assert all(x.lr == 0.2 for x in report.lines)
    assert report.facts["critical_batch"] == pytest.approx(critical, rel=0.05)
    assert report.facts["noise_scale"] == pytest.approx(400)
    assert any("within the factor of ten" in f for f in report.findings)
    plots.draw(tmp_path / "x.png", EXPERIMENTS["mccandlish-tradeoff"], SMALL, report, {})
    assert (tmp_path / "x.png").stat().st_size > 10_000


def test_the_page_shows_a_row_that_diverged(tmp_path):
    experiment = EXPERIMENTS["goyal-figure1"]
    cells = small_cells(experiment.rows(SMALL), tmp_path)
    for cell in cells:
        k = cell.recipe.batch.workers
        if k == 128:
            write_run(cell, [90], 5, status="failed")
        else:
            write_run(cell, [20, 10 + cell.seed * 0.1 + (3 if k > 16 else 0)] * 5, 100)
    report = table.summarise(experiment, SMALL, cells, 2)
    assert report.facts["break_point"] == 32 * 32
    page = table.markdown(experiment, report, "hpc-lbsgd reproduce goyal-figure1", ["here"])
    (lost,) = [x for x in page.splitlines() if x.startswith("| 128 x reference | 4096 |")]
    assert "| 2 of 2 diverged |" in lost and "23.60 ± 0.12" in page
    json.dumps(table.as_json(report), allow_nan=False)
    plots.draw(tmp_path / "x.png", experiment, SMALL, report, {})


def test_a_quick_look_keeps_the_schedules_shape_and_says_what_it_is(tmp_path):
    for experiment in EXPERIMENTS.values():
        rows = experiment.rows(SMALL)
        whole, quick = (cells_of(rows, 1, [], tmp_path, quick) for quick in (False, True))
        assert {c.folder.path for c in whole}.isdisjoint(c.folder.path for c in quick) or experiment.kind == "tradeoff"
        images = [sum(c.recipe.build_schedule(20_000).samples_ahead(0) for c in cells) for cells in (whole, quick)]
        assert images[1] <= images[0] * 0.5
        assert [len(c.recipe.schedule.milestones) > 0 for c in whole] == [
            len(c.recipe.schedule.milestones) > 0 for c in quick
        ]
    (cell,) = cells_of(table1(SMALL)[:1], 1, [], tmp_path, quick=True)
    assert (cell.recipe.train.epochs, cell.recipe.schedule.milestones, cell.recipe.schedule.warmup_epochs) == (
        2,
        [1],
        0.2,
    )
    write_run(cell, [20, 10], 40)
    report = table.summarise(EXPERIMENTS["goyal-table1"], SMALL, [cell], 1)
    report.facts["cut_short"] = cut_short([cell], quick=True)
    page = table.markdown(EXPERIMENTS["goyal-table1"], report, "hpc-lbsgd reproduce goyal-table1 --quick", [])
    assert "**Not the whole experiment**: a quick look" in page
    assert cut_short(cells_of(table1(SMALL), 1, [], tmp_path), quick=False) is None
    capped = cut_short(cells_of(table1(SMALL), 1, ["train.max_steps=7"], tmp_path), quick=False)
    assert capped == "cut short by train.max_steps, at 7 of up to 6250 steps"


def test_what_is_left_is_reckoned_in_images(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    cells = cells_of(table1(SMALL)[:2], 1, ["train.epochs=6"], tmp_path)
    cells += cells_of(table1(SMALL)[:1], 1, ["train.epochs=12", "schedule.milestones=[6]"], tmp_path)
    write_run(cells[0], [10], 20)
    pace = Pace(cells)
    now[0] = 60.0
    write_run(cells[1], [10], 20)  # 6 of the 18 epochs that were left
    assert pace.left_s() == pytest.approx(120.0, rel=0.02)


def test_progress_is_read_from_the_end_of_the_metrics(tmp_path):
    (cell,) = small_cells(table1(SMALL)[:1], tmp_path, seeds=1)
    assert cell.progress(100) == 0.0
    write_run(cell, [], 60)
    with open(cell.folder.metrics, "a") as f:
        f.write('{"kind": "step", "st')  # being written
    assert 0.5 < cell.progress(100) <= 0.6
    assert isinstance(cell.folder, RunFolder)

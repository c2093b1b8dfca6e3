"""`bench scaling`: what is made of launches, and what is refused before anything starts."""

import json
import re

import pytest
from conftest import command, write_recipe

from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.bench.core.launches import Contender, Place, environment
from hpc_lbsgd.bench.core.timing import StepTime, Timed
from hpc_lbsgd.bench.scaling import measure, results, run, show
from hpc_lbsgd.bench.scaling.results import Folder, summarise
from hpc_lbsgd.bench.scaling.run import Request
from hpc_lbsgd.errors import RequestError


def record(images_per_s, step_s=(0.1, 0.2), own_s=(0.1,), wait=0.0, exposed=0.05):
    return {"images_per_s": images_per_s, "step_s": list(step_s), "own_s": list(own_s), "data_wait_share": wait,
            "exposed_comm_share": exposed}  # fmt: skip


def launch(ranks, number, images_per_s, end_to_end=None, per_node=8, mode="weak", **more):
    found = {"synthetic": record(images_per_s, own_s=[0.1] * ranks, **more)}
    if end_to_end:
        found["loader"] = {"images_per_s": 2 * end_to_end}
        found["end-to-end"] = record(end_to_end, wait=0.25)
    hosts = [f"node{rank // per_node + 1:02d}" for rank in range(ranks)]
    about = {"global_batch": 32 * ranks, "passes_per_step": 1, "rounds": [found]}
    return {"ranks": ranks, "round": number, "hosts": hosts, "engine": "horovod", "device": "cpu", "threads": 1,
            "modes": {mode: about}}  # fmt: skip


def asked(ranks):
    return run.question("r", recipes.validate({}), ranks, ["weak"])


def rows(result):
    return {(r["mode"], r["ranks"]): r for r in result["rows"]}


# ---------------------------------------------------------------- rows


def test_efficiency_is_per_rank_round_by_round_against_a_stated_baseline():
    """The machine slows down by half from round to round: efficiency must not see it."""
    launches = [launch(r, i, speed / 2**i) for i in range(3) for r, speed in ((1, 100), (4, 360), (16, 1200))]
    result = summarise(asked([1, 4, 16]), launches)
    found = rows(result)
    assert found["weak", 16]["images_per_s"] == 600
    assert [found["weak", r]["efficiency"] for r in (1, 4, 16)] == pytest.approx([1.0, 0.9, 0.75])
    assert found["weak", 16]["efficiency_low"] == found["weak", 16]["efficiency_high"] == pytest.approx(0.75)
    assert result["baseline_ranks"] == 1 and "1 rank" in result["baseline"]
    other = summarise(asked([1, 4, 16]), launches, 4)
    assert rows(other)["weak", 16]["efficiency"] == pytest.approx(0.75 / 0.9)
    assert "4 ranks" in other["baseline"] and "4 ranks" in show.table(other)
    assert all("baseline_ranks=4" in line for line in show.lines(other))


def test_percentiles_are_over_the_steps_of_all_rounds():
    launches = [launch(2, i, 10, step_s=[i + j / 50 for j in range(50)]) for i in range(2)]
    row = rows(summarise(asked([2]), launches))["weak", 2]
    assert (row["step_s_p50"], row["step_s_p90"], row["step_s_p99"]) == pytest.approx((0.99, 1.782, 1.9602))


def test_the_slowest_rank_is_named_by_its_own_work():
    """A rank that waits long for others is not slow. One bad round does not make a rank the slowest."""
    own = [[0.1, 0.1, 0.12, 0.1], [0.1, 0.1, 0.12, 0.5], [0.1, 0.1, 0.12, 0.1]]
    found = results.slowest(own, ["a", "a", "b", "b"])
    assert (found["slowest_rank"], found["slowest_host"]) == (2, "b")
    assert found["slowest_over_median"] == pytest.approx(0.2)
    fast, slow = [StepTime(1.0, 0.0, 0.6)] * 2, [StepTime(1.0, 0.3, 0.1)] * 2
    merged = measure.of_all_ranks(Timed(8.0, fast), [fast, slow])
    assert merged["own_s"] == pytest.approx([0.4, 0.9]) and merged["step_s"] == [1.0, 1.0]
    assert (merged["data_wait_share"], merged["exposed_comm_share"]) == pytest.approx((0.15, 0.35))


def test_the_three_rates_stand_together_where_there_is_data_and_their_absence_is_said():
    result = summarise(asked([1, 2]), [launch(1, 0, 100, 80), launch(2, 0, 190, 100)])
    row = rows(result)["weak", 2]
    assert row["rates"] == {"synthetic": 190, "loader": 200, "end-to-end": 100}
    assert row["end_to_end_efficiency"] == pytest.approx(100 / 160) and row["data_wait_share"] == 0.25
    assert "end-to-end, images/s" in show.table(result)
    assert "synthetic pictures only" in show.table(summarise(asked([1]), [launch(1, 0, 100)]))


# ---------------------------------------------------------------- the folder


def test_pieces_of_jobs_that_know_nothing_of_each_other_make_one_report(tmp_path):
    folder = Folder(tmp_path / "sweep")
    folder.claim(asked([8, 16, 32]))
    for ranks, speed in ((16, 150), (8, 80)):
        two_rounds = launch(ranks, 0, speed)
        two_rounds["modes"]["weak"]["rounds"] *= 2
        Folder(folder.path).claim(asked([ranks]))
        folder.add(0, two_rounds)
    assert [(x["ranks"], x["round"]) for x in folder.launches()] == [(8, 0), (8, 1), (16, 0), (16, 1)]
    result = show.report(folder.path, None)
    assert [(r["ranks"], r["nodes"], r["rounds"]) for r in result["rows"]] == [(8, 1, 2), (16, 2, 2)]
    assert result["missing_ranks"] == [32] and "no result on 32 ranks" in folder.table.read_text()
    assert json.loads(folder.results.read_text()) == result and folder.plot.stat().st_size > 1000
    folder.forget([8])
    assert [x["ranks"] for x in folder.launches()] == [16, 16]


def test_a_folder_of_something_else_is_refused(tmp_path):
    folder = Folder(tmp_path)
    folder.claim(asked([1]))
    other = run.question("r", recipes.validate({"precision": "bf16"}), [1], ["weak"])
    with pytest.raises(RequestError, match=r"recipe.precision = bf16 \(there: float32\)"):
        folder.claim(other)


def test_the_line_for_scripts_is_what_the_manual_says():
    from pathlib import Path

    page = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text()
    pattern = re.search(r"^(\^scaling: mode=.*)$", page, re.MULTILINE).group(1)
    lines = show.lines(summarise(asked([1, 2]), [launch(1, 0, 100), launch(2, 0, 190)]))
    found = re.search(pattern, lines[1])
    assert found.groups() == ("weak", "2", "1", "190.0", "0.9500", "1")


# ---------------------------------------------------------------- what is asked for


def test_strong_scaling_has_one_global_batch():
    recipe = recipes.validate({"machine": {"workers_per_pass": 2}})
    question = run.question("r", recipe, [1, 4], None)
    settled = recipes.validate(question["recipe"])
    batches = {mode: [measure.with_workers(settled, mode, ranks).batch.workers for ranks in (1, 4)]
               for mode in ("weak", "strong")}  # fmt: skip
    assert batches == {"weak": [2, 8], "strong": [8, 8]}
    # one size alone cannot know the others' k: only weak scaling is measured, unless the recipe says k
    assert run.task_of(run.question("r", recipe, [4], None), Request(), 1)["modes"] == ["weak"]
    fixed = recipes.validate({"batch": {"workers": 8}})
    assert run.task_of(run.question("r", fixed, [4], None), Request(), 1)["modes"] == ["weak", "strong"]


def test_steps_are_alike():
    recipe = recipes.read("smith-imagenet-increasing-batch")
    one = measure.with_workers(recipe, "weak", 4)
    schedule = one.build_schedule(1000)
    assert len({(schedule.at(s).lr, schedule.at(s).count) for s in range(200)}) == 1


def test_threads_of_a_rank_do_not_change_with_their_number(monkeypatch):
    monkeypatch.setattr(run.worlds, "cores", lambda: 16)
    assert run.threads_of(Request(), [1, 8]) == 2
    assert run.threads_of(Request(ranks_per_node=4), [4, 32]) == 4
    assert run.threads_of(Request(place=Place(hosts="a:8,b:8")), [1, 16]) == 2


def test_what_says_which_network_there_is_belongs_to_no_contender(monkeypatch):
    """Without a site's exclusions MPI hangs on docker0. Scaling takes all of the caller's environment."""
    monkeypatch.setenv("OMPI_MCA_btl_tcp_if_exclude", "lo,docker0")
    monkeypatch.setenv("HOROVOD_CYCLE_TIME", "7")
    stock = environment(Contender("stock", {}, {}, 2))
    assert stock["OMPI_MCA_btl_tcp_if_exclude"] == "lo,docker0" and "HOROVOD_CYCLE_TIME" not in stock
    assert environment(Contender("2 ranks", None, {}, 2))["HOROVOD_CYCLE_TIME"] == "7"


@pytest.mark.parametrize(
    "words, said",
    [
        (["--nodes", "1,2"], "--ranks-per-node"),
        (["--ranks", "1,2", "--baseline", "4"], "--baseline 4: not one of the numbers of ranks, 1, 2"),
        (["--baseline", "4"], "--baseline 4: give it with --ranks or --nodes, or later to --report"),
        (["--ranks", "1,x"], "expected whole numbers"),
        (["--ranks", "1,4", "--hosts", "a:1,b:2"], "has room for 3"),
        (["--ranks", "2", "--mode", "strong"], "--mode strong on one number of ranks"),
        (["--ranks", "1,4", "--set", "batch.workers=2"], "batch.workers = 2 on 4 ranks"),
        (["--ranks", "1", "--set", "data.train=nowhere"], "data.train = nowhere: nowhere: no such folder"),
        (["--ranks", "1", "--set", "model.name=magic"], "model.name = 'magic'"),
        (["--report", "nowhere"], "--report nowhere: no scaling benchmark there"),
    ],
)
def test_command_line_refuses_before_work_starts(words, said, tmp_path):
    done = command("bench", "scaling", *words, cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert done.stderr.count("hpc-lbsgd: ") <= 1 and "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_data_too_small_for_the_global_batch_is_refused(small_recipe, tmp_path):
    recipe = write_recipe(tmp_path / "r.yaml", small_recipe)
    done = command("bench", "scaling", recipe, "--ranks", "1,64", "--set", "batch.workers=per_rank", cwd=tmp_path)
    assert done.returncode == 2 and "more than the 203 samples of an epoch" in done.stderr

"""`bench simulate --calibrate ... --against ...`: what is learnt from two runs, and what others are held against."""

import json
from dataclasses import replace

import pytest

from hpc_lbsgd import cli
from hpc_lbsgd.bench.simulate import calibrate, show
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.theory import simulate as model

LAYERS = calibrate.layers_of_model("resnet20", 32)


def result_of(ranks, step_s, parts, **changes):
    """As `bench step --json` prints it; parts were timed in other, slower steps."""
    names = ("forward_s", "backward_s", "exposed_comm_s", "optimizer_s")
    row = {"way": "hpc_lbsgd", "batch": 8, "step_s": step_s, **dict(zip(names, parts, strict=True))}
    row |= {"images_per_s_low": ranks * 8 / (1.1 * step_s), "images_per_s_high": ranks * 8 / step_s}
    where = {"device": "cpu", "threads": 1, "cores": 2, "ranks": ranks}
    facts = {"machine": "here", "model": "resnet20", "image_size": 32}
    return {**facts, "rows": [row], "conditions": {"hpc_lbsgd": where}, **changes}


RESULTS = {
    1: result_of(1, 0.040, (0.015, 0.028, 0.001, 0.006)),
    2: result_of(2, 0.050, (0.018, 0.034, 0.012, 0.006)),
    4: result_of(4, 0.110, (0.030, 0.060, 0.040, 0.010)),
    8: result_of(8, 0.240, (0.060, 0.120, 0.080, 0.020)),
}


@pytest.fixture
def files(tmp_path):
    for ranks, result in RESULTS.items():
        (tmp_path / f"{ranks}.json").write_text(json.dumps(result))
    return {ranks: tmp_path / f"{ranks}.json" for ranks in RESULTS}


def test_the_calibrating_runs_come_out_as_measured(files):
    result = calibrate.compare([files[2], files[1]], [files[4], files[8]])
    rows = {r["ranks"]: r for r in result["rows"]}
    assert [r["calibrated"] for r in result["rows"]] == [True, True, False, False]
    for ranks in (1, 2):
        assert rows[ranks]["step_s"] == pytest.approx(RESULTS[ranks]["rows"][0]["step_s"], rel=1e-3)
        assert rows[ranks]["error"] == pytest.approx(0, abs=1e-3)
    assert rows[2]["exposed_comm_s"] == pytest.approx(0.050 * 12 / 70, rel=1e-3)
    (learnt,) = result["constants"]
    assert learnt["crowding"] == pytest.approx(0.050 * 58 / 70 / 0.040)
    assert learnt["forward_s"] == pytest.approx(0.040 * 15 / 50)


def test_ranks_that_share_a_core_compute_and_copy_slower(files):
    """Twice as many ranks on the same cores: a step of two takes at least twice as long, and 2(p-1)/p more bytes."""
    result = calibrate.compare([files[1], files[2]], [files[4], files[8]])
    rows = {r["ranks"]: r for r in result["rows"]}
    assert [rows[r]["ranks_per_core"] for r in (1, 2, 4, 8)] == [1, 1, 2, 4]
    alone = 0.050 * 58 / 70
    for ranks, shared in ((4, 2), (8, 4)):
        assert rows[ranks]["step_s"] - rows[ranks]["exposed_comm_s"] == pytest.approx(shared * alone, rel=1e-3)
    assert rows[4]["exposed_comm_s"] > 2 * rows[2]["exposed_comm_s"]
    assert rows[8]["error"] == pytest.approx(rows[8]["step_s"] / 0.240 - 1)
    assert rows[8]["error_points"] == pytest.approx(100 * (rows[8]["efficiency"] - 0.040 / 0.240))
    assert "learnt from the calibrating runs" in show.show_compared(result)


def test_predictions_do_not_look_at_what_they_are_held_against(files, tmp_path):
    before = calibrate.compare([files[1], files[2]], [files[4]])["rows"]
    (tmp_path / "slow.json").write_text(json.dumps(result_of(4, 9.0, (1, 1, 1, 1))))
    after = calibrate.compare([files[1], files[2]], [tmp_path / "slow.json"])["rows"]
    assert [r["step_s"] for r in before] == [r["step_s"] for r in after]


def test_results_of_one_number_of_ranks_are_rounds(files, tmp_path):
    """Medians over files, the spread over all of them."""
    for name, seconds in (("a", 0.100), ("b", 0.130)):
        (tmp_path / f"{name}.json").write_text(json.dumps(result_of(4, seconds, (1, 1, 1, 1))))
    rounds = [files[4], tmp_path / "a.json", tmp_path / "b.json"]
    row = calibrate.compare([files[1], files[2]], rounds)["rows"][-1]
    found = [row[f"measured_step_s{which}"] for which in ("", "_low", "_high")]
    assert row["ranks"] == 4 and found == pytest.approx([0.110, 0.100, 1.1 * 0.130])


def test_crowding_grows_with_the_cores_in_use():
    system = calibrate.calibrated(RESULTS[1]["rows"][0], RESULTS[2]["rows"][0], LAYERS, 2, 4)
    factors = [calibrate.on_ranks(system, ranks).cluster.compute_factor for ranks in (1, 2, 4, 8)]
    assert factors[0] == 1 and factors[1] == pytest.approx(0.050 * 58 / 70 / 0.040)
    assert factors[2] - 1 == pytest.approx(3 * (factors[1] - 1)) and factors[3] == pytest.approx(2 * factors[2])
    one_core = replace(system.cluster, cores=1, ranks_per_node=3)
    assert one_core.compute_factor == 3
    assert model.step(calibrate.on_ranks(system, 1), 1).exposed_comm_s == 0


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"model": "resnet8"}, "model = resnet8, but resnet20"),
        ({"machine": "there"}, "machine = there, but here"),
        ({"conditions": {}}, "not what `bench step"),
        ({"conditions": {"hpc_lbsgd": {"device": "cuda:0", "threads": 1, "cores": 2, "ranks": 4}}}, "cuda:0"),
        ({"rows": []}, "no batch 8"),
    ],
)
def test_results_that_do_not_belong_together_are_refused(files, tmp_path, changes, says):
    (tmp_path / "other.json").write_text(json.dumps(RESULTS[4] | changes))
    with pytest.raises(RequestError, match=says):
        calibrate.compare([files[1], files[2]], [tmp_path / "other.json"])


def test_wrong_requests(files, capsys):
    for words, says in (
        (["--calibrate", files[1], files[2]], "go together"),
        (["--calibrate", files[1], files[4], "--against", files[8]], "one of 2 to 2 ranks"),
        (["--calibrate", files[1], "no.json", "--against", files[8]], "no.json: No such file"),
    ):
        assert cli.main(["bench", "simulate", *map(str, words)]) == 2
        assert says in capsys.readouterr().err


def test_command_line(files, capsys):
    words = ["--calibrate", files[1], files[2], "--against", files[4], files[8], "--json"]
    assert cli.main(["bench", "simulate", *map(str, words)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [r["ranks"] for r in result["rows"]] == [1, 2, 4, 8] and result["calibrated_on_ranks"] == [1, 2]

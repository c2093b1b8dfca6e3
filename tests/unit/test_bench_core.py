"""What benchmarks share: turns, spread, and JSON that any reader takes."""

import json

from hpc_lbsgd.bench.core.output import give
from hpc_lbsgd.bench.core.spread import by_round, spread
from hpc_lbsgd.bench.core.turns import rotated, there_and_back


def test_every_contender_begins_once_and_neighbours_change():
    assert [rotated("abc", number) for number in range(4)] == [list(o) for o in ("abc", "bca", "cab", "abc")]
    assert [there_and_back("abc", number) for number in range(3)] == [list(o) for o in ("abc", "cba", "abc")]


def test_spread_is_what_a_row_has():
    assert spread("step_s", iter([3.0, 1.0, 2.0])) == {"step_s": 2.0, "step_s_low": 1.0, "step_s_high": 3.0}
    assert by_round([2.0, 4.0], [1.0, 4.0]) == [2.0, 1.0]


def test_json_has_no_infinity(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["hpc-lbsgd", "bench", "step"])  # a process of xdist has no words
    drawn = []
    give({"rows": [{"a": float("inf")}]}, str, True, tmp_path / "x.png", lambda path, result: drawn.append(path))
    result = json.loads(capsys.readouterr().out)
    assert result["rows"] == [{"a": None}] and drawn == [tmp_path / "x.png"]
    assert result["command"] == "hpc-lbsgd bench step" and "commit" in result

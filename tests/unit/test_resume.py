"""Which run a start goes on with: the one that is named, or none, never another one without a word."""

import json
import os

import pytest
from conftest import command

from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.runs import RESUME, RESUME_IF_EXISTS, choose_run


def run_at(folder, seconds=1):
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text("")
    os.utime(folder, (seconds, seconds))
    return folder


@pytest.mark.parametrize(
    "flag, there, says",
    [
        (None, False, None),
        (None, True, r"--run .*run: a run is there already; continue it with --resume, or name another"),
        (RESUME, True, None),
        (RESUME, False, r"--resume: no run in .*run \(no recipe.yaml\); .*--resume-if-exists"),
        (RESUME_IF_EXISTS, True, None),
        (RESUME_IF_EXISTS, False, None),
    ],
)
def test_a_named_run_must_be_there_must_not_or_may(flag, there, says, tmp_path):
    if there:
        run_at(tmp_path / "run")
    else:
        (tmp_path / "run").mkdir()  # a folder is no run
    if says is None:
        assert choose_run("r", str(tmp_path / "run"), flag).path == tmp_path / "run"
    else:
        with pytest.raises(RequestError, match=says):
            choose_run("r", str(tmp_path / "run"), flag)


def test_without_a_name(tmp_path):
    """The newest run of this very recipe. A batch script has to say which: another job may write to the newest."""
    run_at(tmp_path / "r-20260101-000000", 1)
    newest = run_at(tmp_path / "r-20250101-000000", 2)
    run_at(tmp_path / "r-large-20260101-000000", 3)
    (tmp_path / "r-20270101-000000").mkdir()
    assert choose_run("r", None, RESUME, tmp_path).path == newest
    assert choose_run("r", None, None, tmp_path).path.name.startswith("r-20")
    with pytest.raises(RequestError, match=r"--resume: no run of \[r\] in .*; name it with --run"):
        choose_run("[r]", None, RESUME, tmp_path)
    with pytest.raises(RequestError, match="--resume-if-exists: say which run with --run"):
        choose_run("r", None, RESUME_IF_EXISTS, tmp_path)


@pytest.mark.parametrize("before", [["train"], ["launch", "--np", "2", "--", "train"]])
def test_a_misspelt_run_is_refused_and_not_made(before, tmp_path):
    words = ["fashion-mnist", "--run", tmp_path / "misspelt"]
    refused = command(*before, *words, "--resume")
    assert refused.returncode == 2 and f"no run in {tmp_path / 'misspelt'}" in refused.stderr, refused.stderr
    assert not (tmp_path / "misspelt").exists()
    refused = command(*before, *words, "--resume", "--resume-if-exists")
    assert refused.returncode == 2 and "not allowed with argument" in refused.stderr


def test_launch_hands_the_flag_on(tmp_path):
    words = ["launch", "--np", "2", "--dry-run", "--", "train", "fashion-mnist", "--run", tmp_path / "run"]
    shown = command(*words, "--resume-if-exists")
    assert shown.returncode == 0 and shown.stdout.split()[-1] == "--resume-if-exists", shown.stderr
    assert "--resume" not in command(*words).stdout
    run_at(tmp_path / "run")
    assert command(*words, "--resume").stdout.split()[-1] == "--resume"
    refused = command(*words)  # here, before any rank starts
    assert refused.returncode == 2 and "a run is there already" in refused.stderr


def test_a_run_goes_on_from_anywhere_where_its_last_start_was_made(tmp_path, monkeypatch, capsys):
    """The recipe's data lies where its relative paths are from, wherever the run was moved."""
    from hpc_lbsgd.cluster import resume as resumes

    home, run, asked = tmp_path / "my project", run_at(tmp_path / "moved"), []
    home.mkdir()
    start = {"ranks": [{"host": "here"}] * 2, "folder": str(home)}
    (run / "environment.json").write_text(json.dumps([{"ranks": [], "folder": str(tmp_path)}, start]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(resumes.launches, "launch", lambda layout, job, dry: asked.append((layout.ranks, job.run)))
    resumes.resume("moved", None, False, [], [], False, dry_run=True)
    assert asked == [(2, str(run))] and os.getcwd() == str(home)
    assert capsys.readouterr().out == f"cd '{home}' && "
    home.rename(tmp_path / "gone")
    monkeypatch.chdir(tmp_path)
    resumes.resume("moved", 1, False, [], [], False, dry_run=True)
    assert asked[1] == (1, "moved") and os.getcwd() == str(tmp_path)

"""`audit`: steps of a run come out again on any number of ranks, and what is not so is named. Real ranks."""

import json
import re
import secrets
import shutil
import stat

import pytest
import torch
from conftest import alone, changed, command, records, train_many

from hpc_lbsgd import owner
from hpc_lbsgd.lease import Lease
from hpc_lbsgd.records import RunFolder
from hpc_lbsgd.train import checkpoint
from hpc_lbsgd.train.replica import state_sha256
from hpc_lbsgd.trained import audit

SHORT = {"batch__workers": 3, "train__eval_epochs": 100, "checkpoint__steps": 5, "checkpoint__keep": 9}
EXACT = SHORT | {"determinism": "any-ranks"}
VARIANTS = {  # tails of a full worker, a short one and none
    "exact": EXACT,
    "amended": EXACT | {"train__callbacks": ["several:Finishes"]},
    "adapts": EXACT | {"schedule__kind": "adaptive-batch", "schedule__noise_factor": 40.0, "schedule__max_batch": 160,
                       "train__noise_scale_steps": 2, "batch__workers": 4, "train__max_steps": None, "train__epochs": 4,
                       "fixed_point": "int32", "model__zero_gamma": True},
    "off": SHORT,
}  # fmt: skip


def several(jobs, root):
    """[(exit code, stdout, stderr)] of commands on one rank; nothing is left where temporary files go."""
    temporary = root / "temporary"
    temporary.mkdir(exist_ok=True)
    path = root / "jobs.json"
    path.write_text(json.dumps([[str(word) for word in words] for words in jobs]))
    result = alone("tests/mpi/several.py", path, temporary)
    assert result.returncode == 0, result.stdout + result.stderr
    assert list(temporary.iterdir()) == []
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def runs(small_recipe, tmp_path_factory):
    """{variant: run folder}, trained on 2 ranks."""
    root = tmp_path_factory.mktemp("audited")
    return train_many(2, {name: changed(small_recipe, **keys) for name, keys in VARIANTS.items()}, root)


def seen(run):
    """All that a folder says of what is in it."""
    paths = sorted([run, *run.rglob("*")])
    stats = [p.lstat() for p in paths]
    return [(p, s.st_mode, s.st_ino, s.st_mtime_ns, s.st_ctime_ns, p.is_file() and p.read_bytes())
            for p, s in zip(paths, stats, strict=True)]  # fmt: skip


def with_other_weights(run, step):
    """One weight is another, and all digests are those of what is there."""
    path = run / "checkpoints" / checkpoint.name_of(step)
    weights = torch.load(path / "weights.pt", weights_only=True)
    name = next(name for name, value in weights.items() if value.is_floating_point())
    weights[name].view(-1)[0] += 0.01
    torch.save(weights, path / "weights.pt")
    state = json.loads((path / "state.json").read_text())
    state.pop(checkpoint.SELF)
    state["files"]["weights.pt"] = checkpoint.file_sha256(path / "weights.pt")
    state["weights_sha256"] = state_sha256(weights)
    (path / "state.json").write_text(json.dumps(checkpoint.signed(state)))


def with_another_loss(run, step):
    """The last digit of one."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    i = next(i for i, line in enumerate(lines) if json.loads(line).get("step") == step and '"step", ' in line)
    before = re.search(r'"loss": ([\d.]+)', lines[i])[1]
    lines[i] = lines[i].replace(before, before[:-1] + str((int(before[-1]) + 1) % 10), 1)
    path.write_text("".join(lines))
    return float(before)


def test_what_came_out_on_two_ranks_comes_out_on_any_and_what_does_not_is_named(runs, small_data, tmp_path):
    held, loss, first, last, capped, no_more, other, broken = (
        shutil.copytree(runs["exact"], tmp_path / name)
        for name in ("held", "loss", "first", "last", "capped", "no-more", "other", "broken")
    )
    lease = Lease(secrets.token_hex(8), secrets.token_hex(8), "now", "here", (owner.this_process(),))
    assert owner.OwnerFile(held).follow(None, lease) and owner.at_work(held)
    for path in (*held.rglob("*"), held):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = seen(held)
    was = with_another_loss(loss, 17)
    with_other_weights(first, 15)
    with_other_weights(last, 20)
    (capped / "amendments.json").write_text('[[8, {"train.bad_steps_limit": 5}]]')
    for step in (5, 10, 15):
        shutil.rmtree(no_more / "checkpoints" / checkpoint.name_of(step))
    (other / "recipe.yaml").write_text((other / "recipe.yaml").read_text().replace("seed: 7", "seed: 8"))
    (broken / "recipe.yaml").write_text("seed: -1\n")
    amend = ["train", runs["amended"] / "recipe.yaml", "--run", runs["amended"], "--resume"]
    amend += ["--amend", "optim.base_lr=0.1"]
    refused = {
        ("audit", no_more): ("has no whole checkpoint that steps on record follow (checkpoints: 20; last step: 19)",),
        ("audit", held, "--from", "7"): ("--from 7: ", "such whole checkpoint"),
        ("audit", held, "--set", f"data.train={small_data / 'eval'}", "--set", "data.samples=null"): (
            f"not the data that {held} was",
        ),
        ("audit", held, "--set", "data.train=nowhere"): ("data.train = nowhere",),
        ("audit", held, "--set", "seed=8"): ("seed = 8 (the run has 7)",),
        ("audit", other): ("made by another recipe", f"{other}/recipe.yaml"),
        ("audit", broken): ("seed = -1",),
    }
    jobs = [
        ["audit", held, "--json"],
        ["audit", held, "--from", "5", "--steps", "12", "--json"],
        ["audit", held, "--from", "0", "--steps", "3"],
        ["audit", loss, "--json"],
        ["audit", first, "--json"],
        ["audit", last, "--json"],
        ["audit", last],
        ["audit", capped, "--from", "5", "--json"],
        ["audit", runs["adapts"], "--from", "5", "--json"],
        ["audit", runs["off"]],
        amend,
        ["audit", runs["amended"], "--from", "5", "--steps", "10", "--json"],
        ["audit", runs["amended"], "--from", "11", "--steps", "4", "--json"],
        *refused,
    ]
    said = several(jobs, tmp_path)
    for job, (code, _, err) in zip(jobs, said, strict=True):
        expected = refused.get(tuple(job))
        assert "Traceback" not in err and (code == 2) == (expected is not None), (job, code, err)
        assert all(words in err for words in expected or ()), (job, err)
    codes = [code for code, *_ in said]
    assert codes[:13] == [0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    found = [json.loads(out) if job[-1] == "--json" else out for job, (_, out, _) in zip(jobs, said, strict=True)]

    newest, older, start, *found = found
    assert (newest["from"], newest["to"], newest["ranks"]) == (15, 20, 1) and newest["start"]["ranks"] == [2, 1]
    assert newest["equal"] and newest["promised"] and newest["weights"] == {"end": True, "checkpoint": True}
    assert (older["from"], older["to"], older["weights"]) == (5, 15, {"checkpoint": True}) and older["equal"]
    assert "steps 0 to 2, taken again on 1 rank: the same as on record to the last digit\n" in start
    with_loss, with_first, with_last, shown_last, with_cap, *found = found
    assert with_loss["first_difference"]["step"] == 17 and with_loss["weights"] == {"end": True, "checkpoint": True}
    wrong, right = with_loss["first_difference"]["what"]["loss"]
    assert right == was != wrong and list(with_loss["first_difference"]["what"]) == ["loss"]
    assert with_first["first_difference"]["step"] == 15 and not any(with_first["weights"].values())
    assert with_last["first_difference"] is None and with_last["weights"] == {"end": True, "checkpoint": False}
    assert "not those of the run's checkpoint" in shown_last
    assert (with_cap["to"], with_cap["equal"]) == (8, True)
    adapts, off, _, across, after, *_ = found
    decided = [r["step"] for r in records(runs["adapts"], "event") if r["event"] == "decision"]
    assert adapts["equal"] and any(5 < step < adapts["to"] for step in decided)
    assert "losses differ by at most" in off and "Shown, not judged" in off and "ranks" in off
    assert (across["to"], across["equal"], after["to"], after["equal"]) == (15, True, 15, True)
    assert seen(held) == before
    audit.Audit("", RunFolder(held), None, 20, False).copy_to(RunFolder(tmp_path / "copy"))
    copied = list((tmp_path / "copy").rglob("*"))  # root may remove what others may not
    assert len(copied) > 6 and all(path.stat().st_mode & stat.S_IWUSR for path in copied)


def test_ranks_audit_as_launch_starts_them(runs, tmp_path, monkeypatch):
    """From another folder, by a relative path."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    run = runs["exact"]
    words = ("launch", "--np", 3, "--oversubscribe", "--", "audit", run.name, "--json")
    result = command(*words, cwd=run.parent)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["equal"] and (found["from"], found["to"], found["ranks"]) == (15, 20, 3)
    assert [path for path in tmp_path.iterdir() if path.name.startswith("hpc-lbsgd-audit-")] == []


START = {"kind": "start", "step": 0, "ranks": 2, "device": "cpu"}


@pytest.mark.parametrize(
    "determinism, starts, here, yes",
    [
        ("any-ranks", [START, START | {"ranks": 5}], START | {"ranks": 3}, True),
        ("any-ranks", [START], START | {"device": "cuda:0 A100"}, False),
        ("any-ranks", [START | {"device": "cuda:0 A100"}], START | {"device": "cuda:3 A100"}, True),
        ("any-ranks", [START | {"device": "cuda:0 A100"}], START | {"device": "cuda:0 H200"}, False),
        ("same-ranks", [START], START, True),
        ("same-ranks", [START, START | {"ranks": 3}], START, False),
        ("same-ranks", [START], START | {"ranks": 3}, False),
        ("off", [START], START, False),
    ],
)
def test_bits_are_promised_as_the_recipe_says(determinism, starts, here, yes):
    assert audit.promised(determinism, starts, here) is yes

"""Runs whose steps are read late, as on GPUs, are the runs that read them at once: to the bit, record for record."""

import json
import os
import re

import pytest
import torch
from conftest import changed, mpirun, records, write_recipe
from test_int32 import BAD as BAD_INT32
from test_int32 import BASE
from test_spine import BAD, OWN, end_of

TIMES = {"time", "step_s", "images_per_s", "data_wait_s", "exposed_comm_s", "seconds", "rank", "ranks"}
# A rate that changes and an update that absorbs it; bad steps; a checkpoint whenever the clock is asked
CLOCK = BAD | {
    "optim__form": "v", "schedule__kind": "cosine", "schedule__warmup": "gradual", "schedule__warmup_epochs": 1,
    "schedule__warmup_start_lr": 0.01, "train__ema_decay": 0.9, "checkpoint__minutes": 1e-9, "checkpoint__keep": 99,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def own_models():
    os.environ["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])


@pytest.fixture(scope="module")
def recipes(small_recipe):
    calm = {"train__noise_scale_steps": 7, "train__preflight": False}
    found = {
        "exact": changed(small_recipe, determinism="any-ranks", precision="float32"),
        "clock": changed(OWN, **CLOCK, **calm),
        "int32": changed(BASE, **BAD_INT32, **calm, train__max_steps=8),
        "ends": changed(OWN, **BAD | {"train__on_bad_step": "stop"}, **calm),
    }
    return found | {"stop-7": found["clock"]}


def train(ranks, jobs, root, codes):
    """jobs: [(name, recipe, resume)]. Returns how many steps were read late, how many at once, and what went wrong."""
    root.mkdir(exist_ok=True)
    (root / "at-once").mkdir(exist_ok=True)
    listed = []
    for name, recipe, resume in jobs:
        path = write_recipe(root / f"{name.replace('/', '-')}.yaml", recipe)
        listed.append([str(path), str(root / name), resume, []])
    (root / "jobs.json").write_text(json.dumps(listed))
    result = mpirun(ranks, "tests/mpi/late.py", root / "jobs.json")
    assert f"codes {codes}" in result.stdout, result.stdout + result.stderr
    late, once = map(int, re.search(r"late (\d+) at once (\d+)", result.stdout).groups())
    said = re.findall(r"step \d+ \(epoch .+", result.stderr)
    return late, once, [re.sub(r"on rank \d|/\S+/", "", line) for line in said]


def told(run, *kinds):
    """All records that are of the run and not of its times."""
    return [{k: v for k, v in r.items() if k not in TIMES} for kind in kinds for r in records(run, kind)
            if r.get("event") not in ("slow", "slow-ended", "resume")]  # fmt: skip


def saved(run):
    """{step: its checkpoint}"""
    return {int(path.name.removeprefix("step-")): path for path in (run / "checkpoints").glob("step-*")}


@pytest.fixture(scope="module")
def alone(recipes, tmp_path_factory):
    """On one rank: at once, and late."""
    root = tmp_path_factory.mktemp("alone")
    jobs = [(f"at-once/{name}", recipe, None) for name, recipe in recipes.items() if name != "stop-7"]
    jobs += [*((name, recipe, None) for name, recipe in recipes.items()), ("stop-7", recipes["stop-7"], "--resume")]
    return root, train(1, jobs, root, [0, 0, 0, 1, 0, 0, 0, 1, 75, 0])


@pytest.mark.parametrize("ranks, engine", [(1, "horovod"), (3, "horovod"), (3, "torch")])
def test_late_is_at_once(recipes, alone, tmp_path, ranks, engine):
    root, (late, once, errors) = alone
    there, here = root / "at-once", root if ranks == 1 else tmp_path
    if ranks > 1:
        on = {name: changed(recipe, machine__engine=engine) for name, recipe in recipes.items()}
        jobs = [*((name, recipe, None) for name, recipe in on.items()), ("stop-7", on["stop-7"], "--resume")]
        late, once, more = train(ranks, jobs, here, [0, 0, 0, 1, 0, 0])
        errors = errors + more
    assert late > once / 2 and len(set(errors)) == 1
    for name in ("exact", "clock", "int32", "ends"):
        for kind in ("step", "epoch", "eval", "event", "end"):
            assert told(here / name, kind) == told(there / name, kind), (name, kind)
    # the next step was under way when the run was asked to stop, and when it found that it must end
    stopped = here / "stop-7"
    assert [r["step"] for r in records(stopped, "event") if r["event"] == "resume"] == [8]
    assert told(stopped, "step", "epoch", "eval") == told(there / "clock", "step", "epoch", "eval")
    assert end_of(stopped) == end_of(there / "clock")
    # and whenever the clock asked for a checkpoint
    found, expected = saved(here / "clock"), saved(there / "clock")
    assert len(found) >= 6 and found.keys() <= expected.keys()
    for step, path in found.items():
        states = [json.loads((where / "state.json").read_text()) for where in (path, expected[step])]
        a, b = ({k: v for k, v in state.items() if k not in ("files", "sha256")} for state in states)
        assert a == b
        for file in ("weights.pt", "optimizer.pt"):
            a, b = (torch.load(where / file, weights_only=True) for where in (path, expected[step]))
            torch.testing.assert_close(a, b, rtol=0, atol=0, msg=lambda m, at=(step, file): f"{at}: {m}")

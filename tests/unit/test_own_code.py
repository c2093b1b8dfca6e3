"""A user's own optimizer, schedule, metrics, callbacks and loggers: what is taken, and what is refused by name before
work starts. On ranks: tests/mpi/test_own_on_ranks.py."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import command, records
from torch import nn

from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.errors import RequestError, RunError
from hpc_lbsgd.records import RunFolder, metrics_of
from hpc_lbsgd.report import curves, watch
from hpc_lbsgd.report.facts import facts
from hpc_lbsgd.theory.schedule import Point
from hpc_lbsgd.train import callbacks, metrics, own_optim, services
from hpc_lbsgd.train.prepare import refuse_other_rates

HERE = Path(__file__).parent
EXAMPLE = HERE.parents[1] / "docs/examples"


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))


# ---------------------------------------------------------------- optimizers


def optim(**keys):
    return recipes.validate({"optim": keys}).optim


@pytest.mark.parametrize(
    "keys, says",
    [
        ({"name": "adamww"}, "did you mean adamw?"),
        ({"name": "own_parts:nothing"}, "no attribute 'nothing'"),
        ({"name": "nowhere:nothing"}, "No module named 'nowhere'"),
        ({"name": "own_parts:math"}, "module, not a function"),
        ({"name": "LBFGS"}, "optim.name = lbfgs: steps by closures"),
        ({"name": "sparseadam"}, "wants sparse gradients"),
        ({"name": "adamw", "options": {"ep": 1}}, "optim.options.ep = 1: adamw takes .*did you mean eps?"),
        ({"name": "adamw", "options": {"lr": 1}}, "optim.options.lr = 1: decided by optim.base_lr and the schedule"),
        ({"name": "adamw", "options": {"betas": [0.8, 0.9]}}, "the first is optim.momentum = 0.9; set both alike"),
        ({"name": "adamw", "beta2": 0.9}, "optim.beta2 = 0.9: of sgd, adam or lars; adamw has optim.options"),
        ({"name": "adamw", "options": {"eps": -1.0}}, "optim.name = adamw: ValueError: Invalid epsilon value"),
        ({"name": "rprop"}, "optim.weight_decay = 0.0001: rprop has no weight decay"),
        ({"name": "own_parts:no_rate"}, "takes no lr"),
        ({"name": "own_parts:not_one"}, "returned float, not a torch.optim.Optimizer"),
        ({"name": "own_parts:half_of_it"}, "b is in none of its groups"),
    ],
)  # fmt: skip
def test_an_optimizer_is_refused_with_key_value_and_what_is_allowed(keys, says):
    named = [("w", nn.Parameter(torch.ones(3, 2))), ("b", nn.Parameter(torch.ones(3)))]
    with pytest.raises(RequestError, match=says):
        own_optim.ByParameter(named, optim(**keys))


def test_options_are_for_others_than_ours():
    with pytest.raises(RequestError, match="sgd has keys of its own"):
        optim(options={"eps": 1.0})


@pytest.mark.parametrize("name, decay", [("adamw", 0.1), ("RMSprop", 0.0), ("torch.optim:SGD", 0.05)])
def test_it_is_torchs_own_with_the_schedules_rate_and_no_decay_on_vectors(name, decay):
    start = [torch.randn(3, 2), torch.randn(3)]
    ours, theirs = ([nn.Parameter(t.clone()) for t in start] for _ in range(2))
    options = {"options": {"betas": [0.8, 0.9]}} if name == "adamw" else {}
    section = optim(name=name, weight_decay=decay, momentum=0.8, base_lr=0.5, **options)
    optimizer = own_optim.ByParameter(list(zip("wb", ours, strict=True)), section)
    kind = {"adamw": torch.optim.AdamW, "RMSprop": torch.optim.RMSprop}.get(name, torch.optim.SGD)
    more = {"betas": (0.8, 0.9)} if name == "adamw" else {"momentum": 0.8}
    groups = [{"params": theirs[:1], "weight_decay": decay}, {"params": theirs[1:], "weight_decay": 0.0}]
    peer = kind(groups, lr=0.5, **more)
    for step, lr in enumerate((0.5, 0.1, 0.2)):
        for a, b in zip(ours, theirs, strict=True):
            a.grad, b.grad = a.detach() * 2 - step, b.detach() * 2 - step
        optimizer.step(Point(step, 0, step, lr, 0.8, 1, 1, 0, 1), 0.0)
        for group in peer.param_groups:
            group["lr"] = lr
        peer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name, says", [("Forgetful", "beside its state dict, or draws"), ("Drawing", "or draws")])
def test_an_optimizer_that_would_not_go_on_as_it_was_is_found_before_the_first_step(name, says):
    named = [("w", nn.Parameter(torch.ones(3, 2)))]
    wrong, _ = own_optim.trial(optim(name=f"own_parts:{name}", weight_decay=0.0), named, {"w": torch.ones(3, 2)})
    assert says in wrong
    assert torch.equal(named[0][1], torch.ones(3, 2))  # copies were tried
    assert own_optim.trial(optim(name="nadam"), named, {"w": torch.ones(3, 2)})[0] is None


def test_an_optimizer_that_puts_another_tensor_in_a_weights_place_is_refused():
    with pytest.raises(RequestError, match="another tensor in the place of w"):
        section = optim(name="own_parts:Replacing", weight_decay=0.0)
        own_optim.trial(section, [("w", nn.Parameter(torch.ones(3, 2)))], {"w": torch.ones(3, 2)})


def test_a_name_is_one_in_any_case_and_options_are_part_of_the_result():
    prints = {recipes.validate({"optim": keys}).fingerprint() for keys in
              ({"name": "AdamW"}, {"name": "adamw"}, {"name": "ADAMW", "options": {}})}  # fmt: skip
    assert len(prints) == 1
    assert recipes.validate({"optim": {"name": "adamw", "options": {"eps": 1e-6}}}).fingerprint() not in prints
    same = {"train": {"metrics": ["a:b"], "callbacks": ["a:b"], "loggers": ["wandb"]}}
    assert recipes.validate(same).fingerprint() == recipes.validate({}).fingerprint()


# ---------------------------------------------------------------- schedules


def scheduled(name):
    keys = {"kind": f"own_parts:{name}", "scaling": "none", "warmup": "none"}
    batch = {"samples_per_worker": 10, "workers": 2}
    recipe = recipes.validate({"schedule": keys, "batch": batch, "train": {"epochs": 3}, "optim": {"base_lr": 0.5}})
    return recipe, recipe.build_schedule(100)


def test_an_own_schedule_decides_rate_and_batch_of_every_step():
    _, schedule = scheduled("halves")
    assert schedule.steps == 5 + 3 + 3
    points = [schedule.at(step) for step in range(schedule.steps)]
    assert [p.global_batch for p in points] == [20] * 5 + [40] * 6
    assert [p.lr for p in points] == pytest.approx([0.5] * 5 + [0.5 / (2 + i / 3) for i in range(6)], abs=1e-12)


@pytest.mark.parametrize(
    "name, says",
    [
        ("drawn", "called twice, it gave two schedules"),
        ("counted", "called twice, it gave two schedules"),
        ("late", r"stages begin at epochs \[1\]"),
        ("split", "workers = 1.0 from epoch 0 on; at least 1, whole"),
        ("negative", "of the learning rate at epoch"),
        ("plain_list", "must return hpc_lbsgd.Stage objects, and returned float"),
        ("broken", r"ZeroDivisionError: .*own_parts.py:\d+, return lr / \(workers - workers\)"),
    ],
)
def test_what_makes_no_schedule_is_refused_by_name(name, says):
    with pytest.raises(RequestError, match=f"schedule.kind = own_parts:{name}: .*{says}|{says}"):
        scheduled(name)


def test_a_resume_with_another_code_of_the_schedule_is_refused(tmp_path):
    recipe, schedule = scheduled("halves")
    folder = RunFolder(tmp_path)
    taken = [{"kind": "step", "step": i, "lr": schedule.at(i).lr, "global_batch": schedule.at(i).global_batch}
             for i in range(9)]  # fmt: skip
    folder.metrics.write_text("".join(json.dumps(r) + "\n" for r in taken))
    refuse_other_rates(recipe, schedule, folder, 9)
    taken[7]["lr"] *= 1 + 1e-15
    folder.metrics.write_text("".join(json.dumps(r) + "\n" for r in taken))
    refuse_other_rates(recipe, schedule, folder, 7)  # of a step that is taken again
    with pytest.raises(RequestError, match="step 7 was taken at lr = .* its code is not what the run was begun with"):
        refuse_other_rates(recipe, schedule, folder, 9)


# ---------------------------------------------------------------- metrics


def test_metrics_are_sums_and_counts_by_the_functions_name():
    found = metrics.load_all(["own_parts:right", "own_parts:of_the_first"])
    outputs, labels = torch.tensor([[2.0, 0], [0, 1], [0, 1]]), torch.tensor([0, 1, 0])
    assert [tuple(map(float, metric(outputs, labels))) for metric in found.values()] == [(2, 3), (1, 2)]
    with pytest.raises(RequestError, match=r"train.metrics = own_parts:mean: returned shape \(\) for 3 samples"):
        metrics.load_all(["own_parts:mean"])["mean"](outputs, labels)
    for names in (["own_parts:accuracy"], ["own_parts:right"] * 2):
        with pytest.raises(RequestError, match="give the function another name"):
            metrics.load_all(names)


# ---------------------------------------------------------------- callbacks


class Fake:
    """A replica, as far as callbacks can tell."""

    def __init__(self):
        self.model = nn.Linear(2, 2)

    def digest(self):
        return torch.tensor(int(sum(p.sum() for p in self.model.parameters()) * 1e6))


def told(*names, record=("step", 3), replica=None):
    asked = []
    view = callbacks.View(Path("run"), {}, replica or Fake(), lambda: asked.append(1))
    them = callbacks.Callbacks(names, view)
    them({"kind": record[0], "step": record[1]})
    return them, asked


@pytest.mark.parametrize(
    "name, says",
    [
        ("Misspelt", "nothing calls on_stpe; called: .*did you mean on_step?"),
        ("Deaf", "has none of on_start"),
        ("Picky", "TypeError: .*missing 1 required positional argument: 'colour'"),
    ],
)
def test_a_callback_that_nothing_could_call_is_refused(name, says):
    with pytest.raises(RequestError, match=f"train.callbacks = own_parts:{name}: {says}"):
        told(f"own_parts:{name}")


def test_a_callback_that_fails_is_named_and_asks_for_the_end_once():
    them, asked = told("own_parts:quits")
    assert "own_parts:quits: SystemExit: 3 (" in them.fault and "own_parts.py:" in them.fault and asked == [1]
    them({"kind": "step", "step": 4})
    assert asked == [1]


def test_a_callback_that_could_change_bits_ends_the_run_at_once():
    before = torch.get_num_threads()
    try:
        with pytest.raises(RunError, match="own_parts:threads: changed torch's number of threads"):
            told("own_parts:threads")
    finally:
        torch.set_num_threads(before)
    replica = Fake()
    sys.modules["own_parts"].meddle = lambda record, view: replica.model.weight.data.add_(1)
    with pytest.raises(RunError, match="changed the model"):
        told("own_parts:meddle", record=("eval", 3), replica=replica)


# ---------------------------------------------------------------- loggers


WANDB = """
import json, os
class Run:
    def __init__(self, words): self.words, self.id = words, words["id"] or "abc"; say("init", words)
    def log(self, values, step): say("log", [values, step])
    def finish(self, exit_code): say("finish", exit_code)
def say(*what):
    with open(os.environ["SAID"], "a") as f: f.write(json.dumps(what) + "\\n")
def init(**words): return Run(words)
"""
MLFLOW = """
class Info: run_id = "1"
class Run: info = Info
def start_run(**words): return Run
def log_params(params): assert len(params) <= 100
def log_metrics(values, step): raise ConnectionError("no server")
def end_run(status): pass
def set_tag(name, text): raise ConnectionError("no server")
"""


def test_a_logger_without_its_package_is_refused_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "nowhere").mkdir()  # a folder of the name is no package
    for name in ("nowhere", "nowhere_at_all"):
        with pytest.raises(RequestError, match=f"train.loggers = {name}: not installed .pip install {name}."):
            services.refuse_missing([name])
    services.refuse_missing(["tensorboard"])


def test_a_run_with_all_of_it_ends_early_as_done_and_services_get_what_tensorboard_gets(tmp_path):
    """A stand-in of W&B keeps what it is told; one of MLflow loses its server, and the run goes on."""
    (tmp_path / "wandb.py").write_text(WANDB)
    (tmp_path / "mlflow.py").write_text(MLFLOW)
    recipe = yaml.safe_load((EXAMPLE / "own_code.yaml").read_text())
    recipe["train"] |= {"epochs": 4, "loggers": ["wandb", "mlflow"], "callbacks": ["own_parts:Early", "own_code:table"]}
    recipe["machine"] = {"engine": "torch"}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    said = tmp_path / "said"
    path = os.pathsep.join([str(tmp_path), str(EXAMPLE), str(HERE), os.environ.get("PYTHONPATH", "")])
    job = command("train", "r.yaml", "--run", "run", cwd=tmp_path, env={"SAID": str(said), "PYTHONPATH": path})
    assert job.returncode == 0, job.stderr
    run = tmp_path / "run"
    assert json.loads((run / "status.json").read_text())["status"] == "done"
    evaluations, ended = records(run, "eval"), records(run, "end")[0]
    assert [r["step"] for r in evaluations] == [10] and ended["steps"] == 11 < 30  # one step more, to end safely
    assert "optimizer      Lion(weight_decay=0.1, momentum=0.9, slow=0.99)" in job.stderr
    assert f"margin {evaluations[0]['margin']:.4g}" in job.stderr and metrics_of(evaluations[0]).keys() == {
        "margin", "worst_class"}  # fmt: skip
    assert len((run / "evaluations.csv").read_text().splitlines()) == 1
    assert job.stderr.count("mlflow is left out from here on: ConnectionError: no server") == 1
    live = watch.Live(RunFolder(run))
    live.look()
    assert (live.facts()["steps"], live.facts()["step"]) == (30, 11)  # own_code is not imported for it
    assert f"margin {evaluations[0]['margin']:.4g}" in "\n".join(watch.lines(live.facts(), [], 120))
    assert [line.get_label() for line in curves.own([facts(run)], "black").axis.lines] == ["margin", "worst_class"]
    lines = [json.loads(line) for line in said.read_text().splitlines()]
    assert lines[0][0] == "init" and lines[0][1]["config"]["optim"]["name"] == "own_code:Lion"
    assert lines[-1] == ["finish", 0]
    logged = [(name, torch.tensor(value).item(), step) for kind, (values, step) in (x for x in lines if x[0] == "log")
              for name, value in values.items() if isinstance(value, float)]  # fmt: skip
    assert sorted(logged) == sorted(scalars_of(run / "tensorboard"))
    assert json.loads((run / "loggers.json").read_text()) == {"wandb": "abc", "mlflow": "1"}
    env = {"SAID": str(said), "PYTHONPATH": path}
    again = command("train", "r.yaml", "--run", "run", "--resume", cwd=tmp_path, env=env)
    assert again.returncode == 0 and "finished this run at step 11; --amend" in again.stderr, again.stderr
    assert [r["steps"] for r in records(run, "end")] == [11]  # a later job of a chain has nothing to do
    on = command("train", "r.yaml", "--run", "run", "--resume", "--amend", "optim.base_lr=0.01", cwd=tmp_path, env=env)
    assert on.returncode == 0 and records(run, "end")[-1]["steps"] == 21, on.stderr


def scalars_of(folder):
    """What TensorBoard was given, as float32."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0})
    events.Reload()
    return [(tag, e.value, e.step) for tag in events.Tags()["scalars"] for e in events.Scalars(tag)]

"""The library, as a script of one's own uses it: in one process, with the torch engine."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SMALL_RECIPE, changed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hpc_lbsgd as lb
from hpc_lbsgd.recipe import validate
from hpc_lbsgd.train import models
from hpc_lbsgd.train.replica import Replica, weights_sha256
from hpc_lbsgd.train.step import Passes, Stepper

N = 203
PAGE = Path(__file__).parents[2] / "docs" / "api.md"
CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("world")


def small_data(dtype=torch.float32) -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    labels = torch.arange(N) % 4
    images = torch.randn(N, 1, 8, 8, generator=generator, dtype=torch.float64) + labels.view(-1, 1, 1, 1) / 2
    return TensorDataset(images.to(dtype), labels)


def small_schedule(**more) -> lb.Schedule:
    given = {"samples": N, "workers": 4, "samples_per_worker": 8, "epochs": 3, "lr": 0.1, "warmup_epochs": 1} | more
    return lb.Schedule(**given)


def small_model(dtype=torch.float32) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(216, 4)
    ).to(dtype)  # fmt: skip


def sgd(model: nn.Module, **more) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3, **more)


def train(run, shuffle, data, steps=None, noise=None, after=lambda: None) -> list[lb.Verdict]:
    """The loop of docs/api.md."""
    criterion, verdicts = nn.CrossEntropyLoss(reduction="none"), []
    for step in shuffle.steps(DataLoader(data, batch_sampler=shuffle)):
        if step.step == steps:
            break
        for group in run.optimizer.param_groups:
            group["lr"] = step.lr
        for part in step.workers:
            with run.part(part):
                run.backward(criterion(run.model(part.inputs), part.labels))
        verdicts.append(run.reduce(step))
        if noise:
            noise.add(verdicts[-1])
        if verdicts[-1]:
            after()
            run.optimizer.step()
        run.optimizer.zero_grad()
    return verdicts


def one_step(run, schedule=None, data=None):
    """Up to the loss of the first part of a step."""
    shuffle = lb.GlobalShuffle(N, schedule or small_schedule(), seed=1)
    return next(iter(shuffle.steps(DataLoader(data or small_data(), batch_sampler=shuffle))))


@pytest.fixture
def run():
    model = small_model()
    return lb.distribute(model, sgd(model), seed=1)


def losses_of(run, part) -> torch.Tensor:
    return nn.functional.cross_entropy(run.model(part.inputs), part.labels, reduction="none")


def compute(run, step) -> None:
    for part in step.workers:
        with run.part(part):
            run.backward(losses_of(run, part))


# ---------------------------------------------------------------- as the trainer


def by_trainer(recipe, data) -> nn.Module:
    """The weights of 20 steps, by the trainer's own parts."""
    recipe = validate(recipe)
    schedule = recipe.build_schedule(N)
    engine = lb.init("torch").engine
    replica = Replica(recipe, 4, engine, CPU)
    requests = Passes(recipe, 0, 1).requests(schedule, recipe.seed, 0, 20)
    batches = ((*(t[torch.from_numpy(r.samples)] for t in data.tensors), 0) for r in requests)
    stepper = Stepper(replica, recipe, batches)
    for number in range(20):
        assert stepper.run(schedule.at(number)).finite
    return replica.model


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_a_script_makes_the_weights_that_the_trainer_makes(precision):
    dtype = getattr(torch, precision)
    content = changed(SMALL_RECIPE, determinism="any-ranks", precision=precision, data__train="x", data__eval="x")
    data = small_data(dtype)
    theirs = by_trainer(content, data)
    recipe = validate(content)
    model = models.build(recipe.model, 1, 4, recipe.seed, dtype).to(memory_format=torch.channels_last)
    plain = [p for p in model.parameters() if p.dim() <= 1]
    decayed = [p for p in model.parameters() if p.dim() > 1]
    groups = [{"params": decayed, "weight_decay": 1e-3}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=recipe.optim.nesterov)
    run = lb.distribute(model, optimizer, seed=recipe.seed, bn_group=4)
    shuffle = lb.GlobalShuffle(data, recipe.build_schedule(N), seed=recipe.seed)
    assert all(train(run, shuffle, data))
    assert weights_sha256(model) == weights_sha256(theirs)


# ---------------------------------------------------------------- the loop


OPTIMIZERS = {
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3),
    "rmsprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=1e-3, momentum=0.9),
    "foreach": lambda m: sgd(m, foreach=True),
    "groups": lambda m: torch.optim.Adam([{"params": [p], "weight_decay": 0.01} for p in m.parameters()]),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_learns_and_goes_on_from_a_file_to_the_same_bits(tmp_path, name):
    def begin():
        model = small_model()
        return lb.distribute(model, OPTIMIZERS[name](model), seed=1)

    schedule, data = small_schedule(epochs=2), small_data()
    whole, first, second = begin(), begin(), begin()
    losses = [v.loss for v in train(whole, lb.GlobalShuffle(data, schedule), data)]
    assert sum(losses[-3:]) < 0.98 * sum(losses[:3])
    train(first, lb.GlobalShuffle(data, schedule), data, steps=6)
    lb.save(tmp_path / "state.pt", first)
    torch.manual_seed(99)
    start = lb.load(tmp_path / "state.pt", second)
    assert start == 6 and weights_sha256(second.model) == weights_sha256(first.model)
    train(second, lb.GlobalShuffle(data, schedule, start=start), data)
    assert weights_sha256(second.model) == weights_sha256(whole.model)


def test_every_way_to_clear_gradients_is_the_same():
    found = set()
    for clear in (
        lambda run: run.optimizer.zero_grad(),
        lambda run: run.optimizer.zero_grad(set_to_none=False),
        lambda run: run.model.zero_grad(),
        lambda run: None,
    ):
        model = small_model()
        run = lb.distribute(model, sgd(model), seed=1)
        shuffle = lb.GlobalShuffle(N, small_schedule(), seed=1)
        for step in shuffle.steps(DataLoader(small_data(), batch_sampler=shuffle)):
            if step.step == 3:
                break
            compute(run, step)
            assert run.reduce(step)
            run.optimizer.step()
            clear(run)
        found.add(weights_sha256(model))
    assert len(found) == 1


def test_gradients_may_be_clipped_after_the_sum_and_are_the_mean_of_the_global_batch():
    model = small_model(torch.float64)
    run = lb.distribute(model, sgd(model), seed=1, bn_group=8)
    step, seen = one_step(run, data=small_data(torch.float64)), []
    for part in step.workers:
        with run.part(part):
            losses = losses_of(run, part)
            seen.append(losses.detach())
            run.backward(losses)
    verdict = run.reduce(step)
    assert verdict.count == 32 and verdict.loss == pytest.approx(torch.cat(seen).mean().item(), abs=1e-12)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert norm > 1e-3
    clipped = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert clipped == pytest.approx(1e-3, rel=1e-3)
    before = model[5].weight.detach().clone()
    run.optimizer.step()
    assert 0 < (model[5].weight - before).norm() < 1e-3
    assert model[1].num_batches_tracked == 1


def test_a_step_that_is_not_finite_is_known_and_changes_nothing(run):
    before = weights_sha256(run.model)
    step = one_step(run)
    for part in step.workers:
        with run.part(part):
            run.backward(losses_of(run, part) * (torch.inf if part.worker == 2 else 1))
    verdict = run.reduce(step)
    assert not verdict and (verdict.bad_ranks, verdict.bad_rank) == (1, 0)
    with pytest.raises(lb.RunError, match="step 0 are not finite"):
        run.optimizer.step()
    assert weights_sha256(run.model) == before
    assert all(train(run, lb.GlobalShuffle(N, small_schedule(), seed=1), small_data(), steps=2))


def test_the_noise_scale_is_measured_where_the_schedule_says(run):
    noise = lb.NoiseScale()
    verdicts = train(run, lb.GlobalShuffle(N, small_schedule(measure_every=3)), small_data(), noise=noise)
    assert [v.measurement is not None for v in verdicts[:7]] == [True, False, False, True, False, False, False]
    value, low, high = noise.value()
    assert low <= value and (high is None or value <= high)


def test_a_loader_that_leaves_samples_out_or_has_another_sampler_is_refused(run):
    shuffle = lb.GlobalShuffle(N, small_schedule())
    with pytest.raises(lb.RequestError, match="batch_sampler=shuffle"):
        next(shuffle.steps(DataLoader(small_data(), batch_size=8)))
    fewer = DataLoader(
        small_data(), batch_sampler=shuffle, collate_fn=lambda rows: torch.stack([r[0] for r in rows[1:]])
    )
    with pytest.raises(lb.RunError, match="7 samples for worker 0, which has 8"):
        next(next(shuffle.steps(fewer)).workers)
    with pytest.raises(lb.RequestError, match="204 samples, and a schedule of 203"):
        lb.GlobalShuffle(N + 1, small_schedule())
    steps = shuffle.steps(DataLoader(small_data(), batch_sampler=shuffle))
    next(next(steps).workers)
    with pytest.raises(lb.RunError, match="1 of this rank's 4 parts"):
        next(steps)
    steps = shuffle.steps(DataLoader(small_data(), batch_sampler=shuffle))
    compute(run, next(steps))
    with pytest.raises(lb.RunError, match="step 0 ended, and was not reduced"):
        next(steps)
    assert train(run, shuffle, small_data(), steps=1)  # a loop that is begun again, as in a notebook


# ---------------------------------------------------------------- refusals


def test_losses_are_one_a_sample_of_one_worker(run):
    part = next(one_step(run).workers)
    with pytest.raises(lb.RequestError, match="a scalar loss.*reduction='none'"), run.part(part):
        run.backward(losses_of(run, part).mean())
    with pytest.raises(lb.RequestError, match="several workers in one backward"), run.part(part):
        run.backward(torch.cat([losses_of(run, part)] * 2))
    with pytest.raises(lb.RequestError, match="not one a sample"), run.part(part):
        run.backward(losses_of(run, part).view(2, 4))


def test_calls_in_another_order_are_refused(run):
    step = one_step(run)
    with pytest.raises(lb.RunError, match="before run.reduce"):
        run.optimizer.step()
    with pytest.raises(lb.RunError, match="outside of `with run.part"):
        run.backward(torch.ones(8, requires_grad=True))
    first = next(step.workers)
    with pytest.raises(lb.RunError, match="outside the passes"):
        losses_of(run.model.eval() and run, first).sum().backward()
    run.model.train()
    with pytest.raises(lb.RunError, match="inside worker 0's"), run.part(first), run.part(first):
        pass
    with pytest.raises(lb.RunError, match="ended without run.backward"), run.part(first):
        losses_of(run, first).sum().backward()
    step = one_step(run)
    with pytest.raises(lb.RunError, match="0 of this rank's 4 parts"):
        run.reduce(step)
    for part in step.workers:
        with run.part(part):
            run.backward(losses_of(run, part))
            with pytest.raises(lb.RunError, match="a second time in one part"):
                run.backward(torch.ones(8, requires_grad=True))
            with pytest.raises(lb.RunError, match="run.reduce: inside"):
                run.reduce(step)
        with pytest.raises(lb.RunError, match="between the parts of a step"):
            run.optimizer.zero_grad()
    run.reduce(step)
    with pytest.raises(lb.RunError, match="reduced already"):
        run.reduce(step)
    with pytest.raises(lb.RunError, match="inside a step"):
        lb.save("nowhere.pt", run)
    with pytest.raises(lb.RequestError, match="closure"):
        run.optimizer.step(lambda: 0.0)
    run.optimizer.step()
    with pytest.raises(lb.RunError, match="before run.reduce"):
        run.optimizer.step()


def test_gradients_cleared_inside_a_step_are_missed(run):
    parts = one_step(run).workers
    part = next(parts)
    with run.part(part):
        run.backward(losses_of(run, part))
    run.model.zero_grad()
    with pytest.raises(lb.RunError, match="was replaced between the parts of step 0"), run.part(next(parts)):
        pass


def test_what_cannot_be_distributed_is_named():
    model = small_model()
    for optimizer, said in (
        (torch.optim.LBFGS(model.parameters()), "LBFGS"),
        (torch.optim.SGD(model[0].parameters(), 0.1), "1.weight is in none"),
        (torch.optim.SGD([*model.parameters(), nn.Parameter(torch.ones(1))], 0.1), "not the model's"),
    ):
        with pytest.raises(lb.RequestError, match=said):
            lb.distribute(model, optimizer)
    half = small_model(torch.bfloat16)
    with pytest.raises(lb.RequestError, match="all float32, or all float64"):
        lb.distribute(half, sgd(half))
    optimizer = sgd(model)
    with pytest.raises(lb.RequestError, match="lb.init settled any-ranks"):
        lb.distribute(model, optimizer, "off")
    lb.distribute(model, optimizer)
    with pytest.raises(lb.RequestError, match="distributed already"):
        lb.distribute(model, optimizer)


def test_one_world_a_process():
    assert lb.init() is lb.init("torch") and lb.init().size == 1
    for asked in ({"determinism": "off"}, {"engine": "horovod"}):
        with pytest.raises(lb.RequestError, match="has begun with engine = torch"):
            lb.init(**asked)
    with pytest.raises(lb.RequestError, match="any-ranks, same-ranks or off"):
        lb.init(determinism="always")


def test_a_file_of_another_model_or_of_nothing_is_refused(tmp_path, run):
    lb.save(tmp_path / "state.pt", run)
    model = nn.Sequential(nn.Linear(4, 2))
    other = lb.distribute(model, sgd(model))
    before = weights_sha256(model)
    with pytest.raises(lb.RequestError, match="is not in the"):
        lb.load(tmp_path / "state.pt", other)
    (tmp_path / "cut.pt").write_bytes((tmp_path / "state.pt").read_bytes()[:1000])
    with pytest.raises(lb.RequestError, match="not a whole file"):
        lb.load(tmp_path / "cut.pt", run)
    with pytest.raises(lb.RequestError, match="No such file"):
        lb.load(tmp_path / "none.pt", run)
    with pytest.raises(lb.RequestError, match="cannot be written"):
        lb.save(tmp_path / "nowhere" / "state.pt", run)
    assert weights_sha256(model) == before


def test_the_package_stays_light_until_the_library_is_used():
    code = "import sys, hpc_lbsgd as lb; assert 'torch' not in sys.modules; lb.Schedule; assert 'init' in dir(lb)"
    subprocess.run([sys.executable, "-c", code], check=True)
    import hpc_lbsgd.api

    assert set(lb.API) == set(hpc_lbsgd.api.__all__)
    stub = Path(lb.__file__).with_suffix(".pyi").read_text()
    assert set(re.findall(r"import (\w+) as \1$", stub, re.M)) == set(lb.API)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lb.nothing


@pytest.mark.parametrize("number", range(3))
def test_the_manuals_scripts_run(number):
    """Those of docs/api.md that are ours: the first, and both "After"."""
    ours = [b for b in re.findall(r"```python\n(.+?)```", PAGE.read_text(), re.S) if "lb.distribute" in b]
    assert len(ours) == 3
    model, data = small_model(), TensorDataset(*(t[:40] for t in small_data().tensors))
    schedule = small_schedule(samples=40, epochs=2)
    shuffle = lb.GlobalShuffle(data, schedule)
    names = {"lb": lb, "torch": torch, "F": nn.functional, "DataLoader": DataLoader, "model": model, "data": data,
             "make_model": lambda: model, "make_data": lambda: data, "optimizer": sgd(model), "shuffle": shuffle,
             "loader": DataLoader(data, batch_sampler=shuffle)}  # fmt: skip
    before = weights_sha256(model)
    exec(ours[number].replace('init("horovod")', "init()").replace("=90", "=7").replace("num_workers=4", ""), names)
    assert weights_sha256(model) != before

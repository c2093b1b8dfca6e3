"""The library under habits of PyTorch scripts: each is right, or refused by name; none trains something else."""

import copy
import io
import re

import pytest
import torch
from test_api import PAGE, N, compute, losses_of, sgd, small_data, small_model, small_schedule, train
from torch import nn
from torch.utils.data import DataLoader

import hpc_lbsgd as lb
from hpc_lbsgd.train.replica import weights_sha256

pytestmark = pytest.mark.usefixtures("world")


def distributed(model=None, optimizer=sgd, **more):
    model = model or small_model()
    return lb.distribute(model, optimizer(model), seed=1, **more)


def trained(run, steps=3, **more):
    """The weights after some steps."""
    train(run, lb.GlobalShuffle(N, small_schedule(), seed=1, **more), small_data(), steps=steps)
    return weights_sha256(run.model)


@pytest.fixture(scope="module")
def plainly(world):
    return trained(distributed())


def all_steps(schedule=None):
    shuffle = lb.GlobalShuffle(N, schedule or small_schedule(), seed=1)
    return shuffle.steps(DataLoader(small_data(), batch_sampler=shuffle))


# ---------------------------------------------------------------- parts


@pytest.mark.parametrize("order", [(0, 0, 1, 2, 3), (3, 2, 1, 0), (0, 2, 2, 3), (0, 1, 2, 3, 3)])
def test_each_part_goes_once_and_in_its_turn(order):
    run, parts = distributed(), list(next(all_steps()).workers)
    with pytest.raises(lb.RunError, match="due: each of step.workers goes once, in their order"):
        for i in order:
            with run.part(parts[i]):
                run.backward(losses_of(run, parts[i]))


def test_a_part_that_failed_is_retried_only_where_nothing_is_lost(plainly):
    run = distributed()
    for step in all_steps():
        if step.step == 3:
            break
        run.optimizer.param_groups[0]["lr"] = step.lr
        for part in step.workers:
            for attempt in range(2 if part.worker == 0 else 1):
                try:
                    with run.part(part):
                        run.backward(losses_of(run, part))
                        if part.worker == attempt == 0:
                            raise MemoryError
                except MemoryError:
                    continue
        run.reduce(step)
        run.optimizer.step()
    assert weights_sha256(run.model) == plainly
    parts = list(next(all_steps()).workers)
    for part in parts[:2]:
        with pytest.raises(KeyError), run.part(part):
            run.backward(losses_of(run, part))
            raise KeyError  # of the second, too: the first's sums are gone by then
        if part is parts[0]:
            with run.part(part):
                run.backward(losses_of(run, part))
    with pytest.raises(lb.RunError, match="worker 0 is due"), run.part(parts[1]):
        pass


@pytest.mark.parametrize("exact", [True, False])
def test_a_loop_begun_again_after_ctrl_c_in_any_place_is_the_same_loop(exact):
    """In a measured step, whose parts lie in a buffer of their own; in the last part, whose sums have begun."""
    schedule = small_schedule(measure_every=1)
    shuffle = lb.GlobalShuffle(N, schedule, seed=1)
    found = set()
    for parts in (0, 2, 4):
        run = distributed()
        if not exact:  # as determinism = off, which this process has not
            run.replica.buckets.fixed = None
        for part, _ in zip(next(all_steps(schedule)).workers, range(parts), strict=False):
            try:
                with run.part(part):
                    run.backward(losses_of(run, part))
                    if part.worker == parts - 1:
                        raise KeyboardInterrupt
            except KeyboardInterrupt:
                break
        train(run, shuffle, small_data(), steps=3)
        found.add(weights_sha256(run.model))
    assert len(found) == 1


@pytest.mark.parametrize("where", ["inside", "between"])
@pytest.mark.parametrize(
    "touch",
    [
        lambda m: nn.utils.clip_grad_norm_(m.parameters(), 1e-4),
        lambda m: m.zero_grad(set_to_none=False),
        lambda m: m.zero_grad(),
    ],
)
def test_gradients_are_not_touched_before_they_are_sums(where, touch):
    run, step = distributed(), next(all_steps())
    with pytest.raises(lb.RunError, match="between the parts"):
        for part in step.workers:
            with run.part(part):
                run.backward(losses_of(run, part))
                if where == "inside":
                    touch(run.model)
            touch(run.model)
        run.reduce(step)


def test_two_models_take_turns_in_one_step_as_in_a_gan(plainly):
    one, two = distributed(), distributed()
    for step in all_steps():
        if step.step == 3:
            break
        parts = list(step.workers)
        for run in (one, two):
            run.optimizer.param_groups[0]["lr"] = step.lr
            for part in parts:
                with run.part(part):
                    run.backward(losses_of(run, part))
            assert run.reduce(step)
            run.optimizer.step()
    assert weights_sha256(one.model) == weights_sha256(two.model) == plainly
    block = next(b for b in re.findall(r"```python\n(.+?)```", PAGE.read_text(), re.S) if "critic_run" in b)
    critic, maker = nn.Linear(64, 1), nn.Linear(64, 64)
    named = {"critic_run": distributed(critic), "maker_run": distributed(maker)}
    named |= {name.replace("run", "optimizer"): run.optimizer for name, run in named.items()}
    named["critic_losses"] = lambda part: critic(maker(part.inputs.flatten(1)).detach())[:, 0]
    named["maker_losses"] = lambda part: critic(maker(part.inputs.flatten(1)))[:, 0]
    before = maker.weight.clone()
    shuffle = lb.GlobalShuffle(N, small_schedule(epochs=2))
    loader = DataLoader(small_data(), batch_sampler=shuffle)
    exec(block, named | {"critic": critic, "maker": maker, "shuffle": shuffle, "loader": loader})
    assert not torch.equal(maker.weight, before)
    steps = all_steps()
    compute(one, next(steps))
    with pytest.raises(lb.RunError, match="ended, and was not reduced"):
        next(steps)


# ---------------------------------------------------------------- what changes behind a run


def frozen(model):
    model[0].weight.requires_grad_(False)


def unfrozen(model):
    model[0].bias.requires_grad_(True)


def laid_otherwise(model):
    model.to(memory_format=torch.channels_last)


def doubled(model):
    model.double()


def assigned(model):
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)


def new_layer(model):
    model[5] = nn.Linear(216, 4)


def more_threads(model):
    torch.set_num_threads(2)


@pytest.mark.parametrize(
    "change, said",
    [
        (frozen, "requires_grad of 0.weight was changed"),
        (unfrozen, "requires_grad of 0.bias was changed.*in no sum"),
        (laid_otherwise, "0.weight does not lie where"),
        (doubled, "does not lie where"),
        (assigned, "0.weight is not the parameter"),
        (new_layer, "5 is not the layer that"),
        (more_threads, "torch.set_num_threads is 2, and lb.init settled 1"),
    ],
)
def test_what_a_script_changes_behind_a_run_is_named_at_the_next_step(tmp_path, change, said):
    model = small_model()
    model[0].bias.requires_grad_(False)
    run = distributed(model)
    trained(run, 1)
    change(model)
    try:
        with pytest.raises(lb.RunError, match=said):
            trained(run, 1)
        with pytest.raises(lb.RunError, match=said):
            lb.save(tmp_path / "state.pt", run)
    finally:
        torch.set_num_threads(1)


def test_a_parameter_that_the_optimizer_got_later_is_not_moved_by_a_ranks_own_gradient():
    run = distributed()
    run.model.add_module("later", nn.Linear(4, 4))
    run.optimizer.add_param_group({"params": run.model.later.parameters()})
    with pytest.raises(lb.RunError, match=r"group 1 has a parameter of shape \(4, 4\)"):
        trained(run, 1)


def test_a_model_is_in_one_run_and_memory_in_one_parameter():
    run = distributed()
    with pytest.raises(lb.RequestError, match="0.weight is in another run"):
        distributed(run.model)
    apart = small_model()
    apart.add_module("again", nn.Linear(216, 4))
    apart.again.weight = nn.Parameter(apart[5].weight.data)
    with pytest.raises(lb.RequestError, match="lie in the same memory"):
        distributed(apart)
    with pytest.raises(lb.RequestError, match="norm_calls={'bn': 2}.*no BatchNorm"):
        distributed(norm_calls={"bn": 2})
    with pytest.raises(lb.RequestError, match="no torch.optim.Optimizer"):
        distributed(optimizer=lambda model: model)


class Remembers(nn.Module):
    """A teacher that follows, and, if asked to, a buffer that a forward changes."""

    def __init__(self, changes=None):
        super().__init__()
        torch.manual_seed(1)
        self.own = nn.Linear(64, 4)
        self.teacher = copy.deepcopy(self.own).requires_grad_(False)
        self.register_buffer("seen", torch.zeros(()))
        self.changes = changes

    def forward(self, x):
        if self.changes == "in place":
            self.seen += x.mean()
        elif self.changes:
            self.seen = self.seen + 1
        return self.own(x.flatten(1))


@pytest.mark.parametrize("how", ["in place", "replaced"])
def test_a_forward_that_remembers_is_named_in_its_first_part(how):
    with pytest.raises(lb.RunError, match="seen was changed inside of run.part"):
        trained(distributed(Remembers(how)), 1)


def test_a_teacher_that_the_script_moves_between_steps_is_the_scripts_own(tmp_path):
    run = distributed(Remembers(), lambda m: torch.optim.SGD(m.own.parameters(), 0.1))
    for step in all_steps():
        if step.step == 3:
            break
        compute(run, step)
        assert run.reduce(step)
        run.optimizer.step()
        with torch.no_grad():
            run.model.teacher.weight.lerp_(run.model.own.weight, 0.1)
    lb.save(tmp_path / "state.pt", run)
    again = distributed(Remembers(), lambda m: torch.optim.SGD(m.own.parameters(), 0.1))
    lb.load(tmp_path / "state.pt", again)
    assert torch.equal(again.model.teacher.weight, run.model.teacher.weight)


def test_batch_norm_measures_in_parts_alone(plainly):
    run = distributed()
    with pytest.raises(lb.RunError, match=r"1 \(BatchNorm2d\): in training mode outside of run.part"):
        run.model(small_data().tensors[0])
    run.model.eval()
    with torch.no_grad():
        run.model(small_data().tensors[0])
    run.model.train()
    assert trained(run) == plainly


def test_a_forward_before_its_part_is_refused_for_its_masks():
    """Without BatchNorm it was taken, with masks of this rank's generator: one rank's were another's nowhere."""
    torch.manual_seed(3)
    one, two = (distributed(nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(64, 4))) for _ in range(2))
    part = next(next(all_steps()).workers)
    with pytest.raises(lb.RunError, match=r"1 \(Dropout\): in training mode outside of run.part.*forward inside"):
        losses_of(one, part)
    with torch.no_grad():
        one.model(part.inputs)
    with two.part(part):
        two.backward(losses_of(two, part) + one.model(part.inputs).detach().sum(1))


def test_copies_of_a_model_are_models(plainly):
    """An average of weights, a whole model in a file: each on its own, and none in the run's way."""
    run, images = distributed(), small_data().tensors[0]
    trained(run, 2)
    average = torch.optim.swa_utils.AveragedModel(run.model)
    written = io.BytesIO()
    torch.save(run.model, written)
    written.seek(0)
    read = torch.load(written, weights_only=False)
    for other in (average.module, read, copy.deepcopy(run.model)):
        before = other[1].running_mean.clone()
        assert torch.equal(other.eval()(images), run.model.eval()(images))
        other.train()(images)
        assert not torch.equal(other[1].running_mean, before)
        assert not torch.equal(other[1].running_mean, run.model[1].running_mean)
    run.model.train()
    assert trained(run, start=2) == plainly


def test_random_numbers_between_parts_are_the_scripts_own():
    run, step = distributed(), next(all_steps())
    parts = list(step.workers)
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    for part in parts:
        with run.part(part):
            run.backward(losses_of(run, part))
    assert run.reduce(step) and torch.equal(torch.rand(3), want)


def test_gradients_that_fixed_point_makes_zero_are_not_trained_on():
    run, step = distributed(), next(all_steps())
    for part in step.workers:
        with run.part(part):
            run.backward(losses_of(run, part) * 1e-13)
    with pytest.raises(lb.RunError, match="100% of gradients .* raise lb.distribute.fixed_point_bits=40."):
        run.reduce(step)
    run = distributed(fixed_point_bits=52)
    assert train(run, lb.GlobalShuffle(N, small_schedule(), seed=1), small_data(), steps=1)[0].flushed < 0.01


# ---------------------------------------------------------------- optimizers of others


class Wrapper(torch.optim.Optimizer):
    """As timm's Lookahead: an Optimizer by name, which steps another one and has none of torch's hooks."""

    def __init__(self, inner):
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = {}, {}
        self.inner, self.param_groups, self.defaults, self.state = inner, inner.param_groups, inner.defaults, {}

    def step(self, closure=None):
        return self.inner.step(closure)


class Projected(torch.optim.SGD):
    """Goes on from its parent's step."""

    def step(self, closure=None):
        super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.clamp_(-0.3, 0.3)


def test_an_optimizer_that_steps_beside_the_hooks_is_refused():
    """It left BatchNorm's statistics as they were at the start, without a word."""
    with pytest.raises(lb.RequestError, match="Wrapper steps beside torch's hooks.*give what it wraps"):
        distributed(optimizer=lambda model: Wrapper(sgd(model)))


def test_a_step_inside_a_step_is_one():
    run = distributed(optimizer=lambda model: Projected(model.parameters(), 0.1))
    trained(run)
    assert run.model[1].num_batches_tracked == 3 and run.model[5].weight.abs().max() <= 0.3 and run.between_steps
    with pytest.raises(lb.RunError, match="before run.reduce"):
        run.optimizer.step()


def test_gradients_of_steps_that_are_not_taken_are_said_to_be_gone():
    """A script that accumulates over iterations took every other gradient for nothing."""
    run = distributed()
    with pytest.warns(UserWarning, match="step 0 was reduced, and optimizer.step.. did not follow") as said:
        for step in all_steps():
            if step.step == 6:
                break
            compute(run, step)
            assert run.reduce(step)
            if step.step % 2:
                run.optimizer.step()
    assert len(said) == 1

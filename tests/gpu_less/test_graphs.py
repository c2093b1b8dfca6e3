"""machine.compile: which graphs a run compiles. The compiler's place is taken by a backend that keeps them."""

import pytest
import torch
from test_frozen import Strict

from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.errors import RunError
from hpc_lbsgd.parallel.compiler import why_not
from hpc_lbsgd.theory.schedule import Point
from hpc_lbsgd.train import compiling, ghost, step
from hpc_lbsgd.train.prepare import settle_again
from hpc_lbsgd.train.replica import Replica

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class Alone(Strict):
    size = local_size = 1

    def start_sum(self, tensor, name):
        return name

    def wait(self, handle):
        pass


class Counter:
    """In the compiler's place: keeps what it is given."""

    def __init__(self):
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph, inputs):
        self.graphs.append(graph)
        return graph.forward

    def calls(self, *names: str) -> int:
        """Operations of these names in all graphs."""
        parts = (m for g in self.graphs for m in g.modules() if isinstance(m, torch.fx.GraphModule))
        called = (getattr(n.target, "__name__", str(n.target)) for part in parts for n in part.graph.nodes)
        return sum(name in names for name in called)


@pytest.fixture
def compiler(monkeypatch):
    counter, compile_it = Counter(), torch.compile
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda f, **named: compile_it(f, backend=counter, **named))
    yield counter
    torch._dynamo.reset()


# Of a ResNet-8. The first norm is in no stage, and has a graph of its own; norms of one shape share one
STAGES, NORMS = 3, 9


class Run:
    """Steps of a ResNet-8 with dropout, on pictures of noise; an epoch's fourth has one short worker."""

    def __init__(self, how: str, workers: int = 2, workers_per_pass: int = 1, bn_group: int = 4, **more):
        content = {
            "model": {"name": "resnet8", "widths": [8, 8, 8], "dropout": 0.2},
            "batch": {"samples_per_worker": 8, "workers": workers, "bn_group": bn_group},
            "machine": {"compile": how, "workers_per_pass": workers_per_pass},
            "data": {"channels": 1, "mean": [0.0], "std": [1.0]},
            "train": {"noise_scale_steps": 0},
            **more,
        }
        self.recipe = recipes.Recipe.model_validate(content)
        self.replica = Replica(self.recipe, 4, Alone(), CPU)
        self.schedule = self.recipe.build_schedule(8 * workers * 3 + 5)

    def step(self, number: int) -> step.Outcome:
        point: Point = self.schedule.at(number)
        torch.manual_seed(number)
        outcome = step.Stepper(self.replica, self.recipe, iter(self.batches(number))).run(point)
        assert outcome.finite
        return outcome

    def batches(self, *numbers: int) -> list:
        """Of these steps, a pass after the other."""
        works = [work for number in numbers for work in step.Passes(self.recipe, 0, 1).at(self.schedule.at(number))]
        return [(torch.randn(n, 1, 8, 8), torch.arange(n) % 4, 0) for n in (sum(work.counts) for work in works)]


def test_a_graph_a_stage_and_none_while_a_run_goes_on(compiler):
    """Steps, passes and learning rates make no new graph; nor does a short worker, or an evaluation."""
    run = Run("stages", determinism="any-ranks")
    made = []
    for number in (0, 1, 3, 4):
        run.step(number)
        made.append(len(compiler.graphs))
        with torch.no_grad():
            run.replica.model.eval()(torch.randn(5, 1, 8, 8))
    assert made == [STAGES + 1] * 4


@pytest.mark.parametrize("how, parts, norms", [("stages", STAGES + 1, NORMS), ("norms", 3, 3)])
def test_groups_of_a_pass_are_one_reduction_and_train_as_they_do_one_by_one(compiler, how, parts, norms):
    """3 workers of 4 groups each, 2 a pass: a graph for two of them and one for one, whatever the step; a tail of one
    short worker has none. No part is cut out, and none put together again. The graphs run as they are, in float64."""
    found = []
    for chosen in ("none", how):
        run = Run(chosen, workers=3, workers_per_pass=2, bn_group=2, precision="float64")
        for number in range(5):
            run.step(number)
        found.append(run.replica.model.state_dict())
    assert len(compiler.graphs) == 2 * parts and compiler.calls("var_mean") == 2 * norms
    assert compiler.calls("batch_norm", "split", "chunk") == 0
    plain, compiled = found
    assert plain["stem.1.num_batches_tracked"] == 5
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=0, atol=1e-12, msg=name)


class InPlace(torch.nn.Module):
    """As torchvision and timm write them: activations in place; `walked`, stages that nobody calls as a whole."""

    def __init__(self, channels, classes, walked=False):
        super().__init__()
        self.walked = walked
        blocks = [self.block(channels, 4), self.block(4, 4)]
        self.stages = torch.nn.ModuleList([torch.nn.ModuleList(blocks) if walked else torch.nn.Sequential(*blocks)])
        self.head = torch.nn.Linear(4, classes)

    def block(self, channels, width):
        parts = torch.nn.Conv2d(channels, width, 3), torch.nn.BatchNorm2d(width), torch.nn.ReLU(inplace=True)
        return torch.nn.Sequential(*parts)

    def forward(self, x):
        for stage in self.stages:
            for part in stage if self.walked else [stage]:
                x = part(x)
        return self.head(x.mean((2, 3)))


def in_place(channels, classes):
    return InPlace(channels, classes)


def walked(channels, classes):
    return InPlace(channels, classes, walked=True)


@pytest.mark.parametrize("model", ["in_place", "walked"])
@pytest.mark.parametrize("how", ["stages", "norms"])
def test_models_of_others_train_compiled_as_they_do_plain(compiler, how, model):
    found = []
    for chosen in ("none", how):
        run = Run(chosen, bn_group=4, precision="float64", model={"name": f"test_graphs:{model}"})
        for number in range(2):
            run.step(number)
        found.append(run.replica.model.state_dict())
    assert compiler.graphs and compiler.calls("batch_norm") == 0
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=1e-12, msg=name)


def test_the_first_pass_of_another_size_may_take_as_long_as_a_compiler(compiler):
    """Step 0 is measured, one worker a pass; step 1 has two a pass. The watchdog hears of both, and of no other."""
    run = Run("stages", workers=4, workers_per_pass=2, train={"noise_scale_steps": 100})
    marks = []
    stepper = step.Stepper(run.replica, run.recipe, iter(run.batches(0, 1, 2)), lambda *said: marks.append(said))
    for number in range(3):
        stepper.run(run.schedule.at(number))
    phases = [(phase, number) for phase, number in marks if phase in ("compile", "compute")]
    assert phases == [("compile", 0), *[("compute", 0)] * 3, ("compile", 1), ("compute", 1), *[("compute", 2)] * 2]


def test_a_gradient_of_a_gradient_is_refused():
    x = torch.randn(8, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    y, _ = ghost.batch_norm(x, 2, None, None, 1e-5)
    (gradient,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


def test_one_group_is_torchs_own(compiler):
    Run("norms", bn_group=8).step(0)
    assert compiler.graphs == []


@pytest.mark.parametrize("how", ["stages", "norms"])
def test_a_compiler_that_fails_is_said_with_the_way_out(how, monkeypatch):
    def fail(graph, inputs):
        raise NotImplementedError("no such GPU")

    compile_it = torch.compile
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda f, **named: compile_it(f, backend=fail, **named))
    with pytest.raises(RunError, match="cannot be compiled .*no such GPU.*machine.compile = none trains"):
        Run(how).step(0)


# ---------------------------------------------------------------- auto


class Odd(torch.nn.Module):
    """Another library's model: no stages, and a `stages` that is none."""

    stages = "3"

    def __init__(self, channels, classes):
        super().__init__()
        self.fc = torch.nn.Linear(channels, classes)


@pytest.mark.parametrize(
    "device, model, problem, chosen",
    [
        (CPU, "resnet50", "is not asked", "none"),
        (GPU, "resnet50", None, "stages"),
        (GPU, "resnet8", None, "stages"),
        (GPU, "inception-resnet-v2", None, "norms"),
        (GPU, "test_graphs:Odd", None, "norms"),
        (GPU, "resnet50", "RuntimeError: no C compiler", "none"),
    ],
)
def test_auto_compiles_where_a_gpu_can(device, model, problem, chosen, monkeypatch, recwarn):
    if model.startswith("inception"):
        pytest.importorskip("timm")
    monkeypatch.setattr(compiling, "why_not", lambda device: problem)
    content = {"model": {"name": model}, "data": {"classes": 4}, "determinism": "any-ranks"}
    asked = recipes.Recipe.model_validate(content)
    found = compiling.settle(asked, device)
    assert found.machine.compile == chosen and compiling.settle(found, device) == found
    said = [str(w.message) for w in recwarn if "machine.compile" in str(w.message)]
    assert len(said) == (device == GPU and chosen == "none") and all(problem in line for line in said)


def test_what_a_gpu_lacks_is_found_by_trying(monkeypatch):
    assert why_not(GPU)  # there is none here
    monkeypatch.setattr(torch, "compile", lambda f: lambda x: x * 2)
    assert "is [2.0, 2.0, 2.0]" in why_not(CPU)


@pytest.mark.parametrize("determinism, kept", [("any-ranks", "stages"), ("same-ranks", "stages"), ("off", "auto")])
def test_a_resume_keeps_what_was_compiled_where_bits_are_promised(determinism, kept):
    asked = recipes.Recipe.model_validate({"determinism": determinism, "batch": {"workers": 2}})
    assert settle_again(asked, asked.with_compile("stages")).machine.compile == kept

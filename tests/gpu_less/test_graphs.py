"""machine.compile: how many graphs a run compiles. The compiler's place is taken by a backend that counts."""

import pytest
import torch
from test_frozen import Strict
from torch._dynamo.testing import CompileCounter

from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.theory.schedule import Point
from hpc_lbsgd.train import step
from hpc_lbsgd.train.replica import Replica

CPU = torch.device("cpu")


class Alone(Strict):
    size = local_size = 1

    def start_sum(self, tensor, name):
        return name

    def wait(self, handle):
        pass


@pytest.fixture
def graphs(monkeypatch):
    counter, compile_it = CompileCounter(), torch.compile
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda f, **named: compile_it(f, backend=counter, **named))
    yield counter
    torch._dynamo.reset()


def test_a_graph_a_stage_and_shape_and_none_while_a_run_goes_on(graphs):
    """Steps, passes and learning rates make no new graph; a short worker at an epoch's end makes one a stage."""
    content = {
        "model": {"name": "resnet8", "widths": [8, 8, 8], "dropout": 0.2},
        "batch": {"samples_per_worker": 8, "workers": 2, "bn_group": 4},
        "machine": {"compile": "stages"},
        "data": {"channels": 1, "mean": [0.0], "std": [1.0]},
        "determinism": "any-ranks",
    }
    recipe = recipes.Recipe.model_validate(content)
    replica = Replica(recipe, 4, Alone(), CPU)
    schedule = recipe.build_schedule(16 * 3 + 5)  # the fourth step has one short worker

    def run(number: int) -> int:
        point: Point = schedule.at(number)
        sizes = [stop - start for j in range(2) for start, stop in [point.worker_range(j)] if stop > start]
        batches = iter([(torch.randn(n, 1, 8, 8), torch.zeros(n, dtype=torch.int64), 0) for n in sizes])
        step.Stepper(replica, recipe, batches).run(point)
        return graphs.frame_count

    stages = 3
    assert len(replica.model.stages) == stages
    assert run(0) == stages
    assert run(1) == run(2) == stages
    assert run(3) == 2 * stages
    assert run(4) == run(7) == 2 * stages

"""The library's own loader: the trainer's batches, for a script."""

import pytest
import torch
from conftest import SAMPLES

import hpc_lbsgd as lb
from hpc_lbsgd.data.find import find
from hpc_lbsgd.data.manifest import Manifest
from hpc_lbsgd.recipe import validate
from hpc_lbsgd.train.parts import make_loaders
from hpc_lbsgd.train.step import Passes


def test_the_loader_gives_the_trainers_batches_to_the_ranks_that_have_the_workers(world, small_recipe):
    recipe = validate(small_recipe)
    path, keys = recipe.data.train, recipe.data.model_dump(exclude={"train", "eval"})
    schedule = recipe.build_schedule(SAMPLES)
    train_set = Manifest(find(path))
    trainers, _ = make_loaders(recipe, train_set, None, torch.contiguous_format, world.engine, world.device)
    asked = Passes(recipe, 0, 1).requests(schedule, recipe.seed, 0, 3)
    theirs = [(batch.inputs.clone(), batch.labels) for batch in trainers.batches(asked)]

    def parts(rank, size, start=0):
        loader = lb.Loader(path, schedule, seed=recipe.seed, start=start, rank=rank, size=size, **keys)
        assert loader.classes == train_set.classes and len(loader) == schedule.steps - start
        found = {}
        for step in loader:
            if step.step == 3:
                return found
            found |= {(step.step, p.worker): (p.inputs.clone(), p.labels) for p in step.workers}

    alone = parts(0, 1)
    assert len(alone) == len(theirs) == 16 + 10 + 16  # the second step is a tail of 75 samples
    assert all(map(torch.equal, sum(alone.values(), ()), sum(theirs, ())))
    of_three = {**parts(0, 3), **parts(1, 3), **parts(2, 3)}
    assert of_three.keys() == alone.keys()
    assert all(torch.equal(of_three[at][i], alone[at][i]) for at in alone for i in (0, 1))
    later = parts(0, 1, start=2)
    assert len(later) == 16 and all(torch.equal(later[at][0], alone[at][0]) for at in later)


@pytest.mark.parametrize("kind", ["torchvision", "dali"])
def test_parts_may_be_kept(world, small_data, kind):
    """As a script with two models keeps those of a step, and a cell that is run again leaves a loop."""
    pytest.importorskip("nvidia.dali") if kind == "dali" else None
    schedule = lb.Schedule(samples=SAMPLES, workers=16, samples_per_worker=8, epochs=2, lr=0.1)
    keys = {"loader": kind, "image_size": 8, "augment": "none", "channels": 1, "mean": [0.0], "std": [1.0]}
    loader = lb.Loader(small_data / "train", schedule, threads=1, **keys)
    passed = [part.inputs.clone() for part in next(iter(loader)).workers]
    for _ in range(3):
        kept = list(next(iter(loader)).workers)
        assert all(map(torch.equal, (part.inputs for part in kept), passed))


def test_what_the_loader_cannot_load_is_named(small_data, tmp_path):
    schedule = lb.Schedule(samples=SAMPLES, workers=4, samples_per_worker=8, epochs=1, lr=0.1)
    folder = small_data / "train"
    for path, keys, said in (
        (folder, {"augmnt": "none"}, "lb.Loader: unknown key augmnt .*did you mean augment"),
        (folder, {"image_size": 9, "augment": "none"}, "data.image_size = 9, but 203 of 203 images"),
        (tmp_path, {}, "index"),
    ):
        with pytest.raises(lb.RequestError, match=said):
            lb.Loader(path, schedule, **keys)
    with pytest.raises(lb.RequestError, match="203 samples, and a schedule of 7"):
        lb.Loader(
            folder,
            lb.Schedule(samples=7, workers=4, samples_per_worker=8, epochs=1, lr=0.1),
            image_size=8,
            augment="none",
        )

"""What the checks share: the device, sizes for it, a folder, pictures, an engine, and steps on noise."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.data import tree
from hpc_lbsgd.parallel import engine as engines
from hpc_lbsgd.train import step
from hpc_lbsgd.train.replica import Replica


class Skip(Exception):
    """A check that this machine has no means for; the message says which."""


class Bench:
    """Sizes are small where the device is a CPU."""

    def __init__(self, device: torch.device, folder: str):
        self.device, self.folder = device, Path(folder)
        self.gpu = device.type == "cuda"
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        for backend in (torch.backends.cudnn, torch.backends.cuda.matmul):
            backend.fp32_precision = "ieee"

    @cached_property
    def engine(self):
        return engines.create(recipes.Machine(), "off", self.device)

    @cached_property
    def photos(self):
        """JPEGs of several shapes with smooth colours and edges, chroma at half the resolution."""
        rng, root = np.random.default_rng(5), self.folder / "photos"
        for i in range(128 if self.gpu else 32):
            coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
            size = [(500, 375), (375, 500), (640, 300), (257, 513)][i % 4] if self.gpu else (80, 60)
            (root / f"c{i % 4}").mkdir(parents=True, exist_ok=True)
            image = coarse.resize(size, Image.Resampling.BICUBIC)
            image.save(root / f"c{i % 4}" / f"{i:03d}.jpg", quality=92, subsampling=2)
        return tree.index(root, processes=1)

    def recipe(self, model: str | dict, n: int, k: int = 1, size: int = 224, **more) -> recipes.Recipe:
        section = model if isinstance(model, dict) else {"name": model}
        data = {"image_size": size, "classes": 4 if isinstance(model, dict) else 1000}
        batch = {"samples_per_worker": n, "workers": k, "bn_group": min(n, 32)}
        return recipes.Recipe.model_validate({"model": section, "data": data, "batch": batch, **more})

    def replica(self, recipe, device=None) -> Replica:
        return Replica(recipe, recipe.data.classes, self.engine, device or self.device)

    def train(self, recipe, steps: int, device=None, settle=lambda stepper: None, bad=()) -> tuple[Replica, float]:
        """A replica after some steps on noise that depends on the step alone, and seconds of the last three. bad: steps
        that are not finite."""
        device = device or self.device
        replica = self.replica(recipe, device)
        schedule = recipe.build_schedule(recipe.batch.samples_per_worker * recipe.batch.workers * steps)
        stepper = step.Stepper(replica, recipe, self.noise(recipe, steps, device, replica, bad))
        settle(stepper)
        outcomes = [*stepper.outcomes(map(schedule.at, range(steps)))]
        found = [outcome.point.step for outcome in outcomes if not outcome.finite]
        assert found == list(bad), f"steps {found} are not finite"
        return replica, sum(outcome.step_s for outcome in outcomes[-3:]) / len(outcomes[-3:])

    def noise(self, recipe, steps: int, device, replica, bad=()):
        generator, n, size = torch.Generator().manual_seed(1), recipe.batch.samples_per_worker, recipe.data.image_size
        layout = torch.channels_last if replica.channels_last else torch.contiguous_format
        for i in range(steps * recipe.batch.workers):
            images = torch.randn(n, 3, size, size, generator=generator).to(device, memory_format=layout)
            if i // recipe.batch.workers in bad:
                images[0, 0, 0, 0] = float("nan")
            labels = torch.randint(0, recipe.data.classes, (n,), generator=generator).to(device)
            yield images, labels, 0

    def wait(self) -> None:
        if self.gpu:
            torch.cuda.synchronize(self.device)

    def busy(self) -> None:
        """Leave the device with work for a while, before what follows."""
        side = 8192 if self.gpu else 64
        x = torch.ones(side, side, device=self.device)
        for _ in range(20):
            x = x @ x * 1e-4

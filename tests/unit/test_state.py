"""What models and losses remember in places that no step sums: refused at the start, by name."""

import tempfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import changed
from test_users_models import Net, checks, own_model
from test_workers import CPU, batches, engine, point_of, run_steps, small_recipe  # noqa: F401
from torch import nn

from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.train import losses

# ---------------------------------------------------------------- state that is no buffer


class Counter(Net):
    """A temperature that falls with the number of forwards."""

    seen = 0

    def forward(self, x):
        self.seen += 1
        return super().forward(x) / max(1.0, 4 - self.seen / 12)


class Centre(Net):
    """A moving centre in a tensor that is no buffer."""

    def __init__(self):
        super().__init__()
        self.held = {"centre": torch.zeros(5)}

    def forward(self, x):
        y = super().forward(x)
        self.held["centre"] = 0.9 * self.held["centre"] + 0.1 * y.detach().mean(0)
        return y - self.held["centre"]


class Keeps(Net):
    """What it saw last: a function of that, and no harm. It works in place, too."""

    positions = None

    def __init__(self):
        super().__init__()
        self.handle = self.fc.register_forward_hook(lambda *_: None)  # numbered through all models of the process
        self.folder, self.parts = tempfile.mktemp(), {nn.Identity(), object()}

    def forward(self, x):
        if self.positions is None:
            self.positions = torch.ones(x.shape[2])
        x.sub_(0.5)
        self.last, self.shape = self.body(x), x.shape
        self.spectrum = torch.fft.fft(self.last).conj()
        return self.fc(self.last)


class Teacher(Net):
    """A moving average of a weight, in the model: equal to it at the start."""

    def __init__(self):
        super().__init__()
        self.register_buffer("teacher", self.fc.weight.detach().clone())

    def forward(self, x):
        with torch.no_grad():
            self.teacher.lerp_(self.fc.weight, 0.1)
        return super().forward(x)


class Logits(Net):
    """Writes a buffer in evaluation."""

    def __init__(self):
        super().__init__()
        self.register_buffer("best", torch.zeros(()))

    def forward(self, x):
        y = super().forward(x)
        if not self.training:
            self.best.copy_(y.max())
        return y


@pytest.mark.parametrize("make, says", [
    (Teacher, r"teacher of the model \(Teacher\) is changed by each forward once its weights have moved"),
    (Logits, r"best of the model \(Logits\) is changed by an evaluation"),
])  # fmt: skip
def test_state_that_shows_later_is_refused_at_the_start(monkeypatch, make, says):
    recipe = own_model(monkeypatch, make)
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"eval": "somewhere"})})
    monkeypatch.setattr("test_users_models.own_model", lambda *_, **__: recipe)
    with pytest.raises(RequestError, match=says):
        checks(monkeypatch, make)


class FirstBatch(Net):
    """A scale taken from the first samples it sees: preflight's at one start, the resume's at another."""

    scale = None

    def forward(self, x):
        self.scale = x.std() if self.scale is None else self.scale
        return super().forward(x / self.scale)


class Closure(Net):
    def __init__(self):
        super().__init__()
        calls = [0]

        def temperature():
            calls[0] += 1
            return 1.0 if calls[0] < 20 else 0.5

        self.temperature = temperature

    def forward(self, x):
        return super().forward(x) / self.temperature()


class Generator(Net):
    def __init__(self):
        super().__init__()
        self.rng = np.random.default_rng(0)

    def forward(self, x):
        return super().forward(x) + float(self.rng.normal()) * 0


@pytest.mark.parametrize("make, name", [
    (Counter, "seen"), (Centre, "held"), (FirstBatch, "scale"), (Closure, "temperature"), (Generator, "rng"),
])  # fmt: skip
def test_attributes_that_each_forward_changes_are_named(monkeypatch, make, name):
    assert checks(monkeypatch, make)["state"].startswith(f"{name} is another where other samples went before")


def test_attributes_that_hold_the_last_batch_do_no_harm(monkeypatch):
    assert set(checks(monkeypatch, Keeps).values()) == {None}
    assert set(checks(monkeypatch, Net).values()) == {None}


class Focused:
    """A loss that remembers."""

    def __init__(self):
        self.mean = 1.0

    def __call__(self, outputs, labels):
        loss = F.cross_entropy(outputs, labels, reduction="none")
        self.mean = 0.9 * self.mean + 0.1 * loss.mean().item()
        return loss / self.mean


def test_a_loss_that_remembers_or_has_parameters_is_refused(monkeypatch):
    remembers = Focused()
    monkeypatch.setattr(losses, "load", lambda name, key: remembers)
    base = changed(small_recipe().model_dump(), train__loss="users:loss")
    monkeypatch.setattr("test_users_models.small_recipe", lambda **changes: recipes.validate(base))
    assert checks(monkeypatch, Net)["state"].startswith("mean of the loss is another where other samples went before")
    monkeypatch.setattr(losses, "load", lambda name, key: nn.CosineEmbeddingLoss())
    losses.loss_function(recipes.validate(base).train)
    monkeypatch.setattr(losses, "load", lambda name, key: nn.Bilinear(1, 1, 1))
    with pytest.raises(RequestError, match="train.loss = users:loss: has parameters, which no step trains"):
        losses.loss_function(recipes.validate(base).train)


class Functional(Net):
    """A BatchNorm used through its buffers alone."""

    def body(self, x):
        n = self.norm
        return F.batch_norm(self.conv(x), n.running_mean, n.running_var, n.weight, n.bias, True, 0.1).mean((2, 3))


def test_statistics_that_something_else_writes_are_refused(monkeypatch):
    with pytest.raises(RequestError, match=r"norm\.running_mean of norm \(BatchNorm2d\) is changed"):
        checks(monkeypatch, Functional)

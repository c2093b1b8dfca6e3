"""`predict`, `evaluate`, `export`: what they see of data and of a run's model."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SMALL_RECIPE, changed
from PIL import Image
from torch import nn

from hpc_lbsgd import recipe
from hpc_lbsgd.data import tree
from hpc_lbsgd.data.decode import pixels
from hpc_lbsgd.data.orientation import TAG
from hpc_lbsgd.data.source import Request, Source
from hpc_lbsgd.errors import RequestError, RunError
from hpc_lbsgd.records import RunFolder
from hpc_lbsgd.train import start
from hpc_lbsgd.trained import opened
from hpc_lbsgd.trained.export import export
from hpc_lbsgd.trained.opened import Trained
from hpc_lbsgd.trained.predict import window_of


@pytest.mark.parametrize("orientation", ["apply", "ignore"])
@pytest.mark.parametrize("eval_resize", [0, 10])
def test_predict_sees_what_evaluation_sees_whichever_way_a_camera_was_held(tmp_path, orientation, eval_resize):
    rng = np.random.default_rng(0)
    for value in range(1, 9):
        path = tmp_path / "photos" / f"class-{value % 2}" / f"{value}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        exif = Image.Exif()
        exif[TAG] = value
        shape = (8, 8, 3) if not eval_resize else (17 + value, 12, 3)
        Image.fromarray(rng.integers(0, 255, shape).astype(np.uint8)).save(path, exif=exif.tobytes())
    found = tree.index(tmp_path / "photos", None, 1)
    look = {"data__orientation": orientation, "data__eval_resize": eval_resize, "data__channels": 3}
    data = recipe.validate(changed(SMALL_RECIPE, data__mean=[0.0] * 3, data__std=[1.0] * 3, **look)).data
    request = Request(0, np.arange(8))
    source = Source(data, found, 0, train=False)
    stored = [pixels(Path(found.file(i)).read_bytes(), 3) for i in range(8)]
    for i, wanted in enumerate(source.cut(source.fetch(request), stored)):
        assert np.array_equal(window_of(found.file(i), data), wanted), found.key(i)


class Own(nn.Module):
    """A model that a person may bring."""

    def __init__(self, kind, inputs=64):
        super().__init__()
        self.kind, self.a, self.b = kind, nn.Linear(inputs, 4), nn.Linear(inputs, 4)
        if kind == "tied":
            self.b.weight = self.a.weight

    def forward(self, x):
        x = x.flatten(1).to(self.a.weight.dtype)
        if self.kind == "branch":
            return self.a(x) if x.sum() > 0 else self.b(x)
        a, b = self.a(x), self.b(x)
        return {"dict": {"logits": a, "rest": (b, a)}, "nan": (a, b * torch.nan)}.get(self.kind, a + b)


def trained(tmp_path, model, **keys):
    data = {"data__classes": 4, "data__train": str(tmp_path)}
    made = recipe.validate(changed(SMALL_RECIPE, **data | keys))
    return Trained(RunFolder(tmp_path), made, 1, False, model.eval(), torch.device("cpu"))


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
@pytest.mark.parametrize("kind", ["dict", "tied", "branch", "nan"])
def test_own_models_are_exported_or_refused_in_a_line(tmp_path, kind, suffix):
    if suffix == ".onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    found, out = trained(tmp_path, Own(kind)), tmp_path / f"model{suffix}"
    if kind in ("branch", "nan"):
        with pytest.raises(RunError, match="cannot follow|differ") as refused:
            export(found, out)
        assert "\n" not in str(refused.value) and list(tmp_path.iterdir()) == []
    else:
        assert export(found, out)["largest_difference"] < 1e-6


def tokens(part):
    return [(np.arange(5) + i, i % 4) for i in range(3)]


def test_a_model_of_own_data_is_exported_by_what_that_data_holds(tmp_path):
    keys = {"data__dataset": f"{__name__}:tokens", "data__train": None}
    assert export(trained(tmp_path, Own("", 5), **keys), tmp_path / "m.pt2")["largest_difference"] == 0


@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod.", "model.", "net.backbone."])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weights_are_taken_from_whatever_held_the_model(tmp_path, prefix, dtype):
    old, new = (nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, classes)) for classes in (5, 3))
    values = {f"{prefix}{k}": v.to(dtype) if v.is_floating_point() else v for k, v in old.state_dict().items()}
    torch.save({"state_dict": values, "epoch": 3}, tmp_path / "w.pt")
    assert start.load_into(new, str(tmp_path / "w.pt")) == ["2.weight", "2.bias"]
    assert torch.equal(new[0].weight, old[0].weight.to(dtype).float())


def test_a_part_called_module_is_the_model_s_own(tmp_path):
    old, new = (nn.ModuleDict({"module": nn.Linear(2, 2)}) for _ in range(2))
    torch.save(old.state_dict(), tmp_path / "w.pt")
    assert start.load_into(new, str(tmp_path / "w.pt")) == []
    torch.save({"other." + k: v for k, v in nn.Linear(2, 3, bias=False).state_dict().items()}, tmp_path / "w.pt")
    with pytest.raises(RequestError, match=r"unknown other\.weight"):
        start.load_into(new, str(tmp_path / "w.pt"))


def test_weights_that_are_not_finite_are_no_start(tmp_path):
    model = nn.Linear(2, 2)
    torch.save(model.state_dict() | {"bias": torch.tensor([1.0, float("nan")])}, tmp_path / "w.pt")
    with pytest.raises(RequestError, match="bias has values that are not finite"):
        start.load_into(model, str(tmp_path / "w.pt"))


def test_an_older_checkpoint_is_taken_with_a_word(tmp_path, monkeypatch, capsys):
    state = SimpleNamespace(step=6, best_step=None)
    monkeypatch.setattr(opened.checkpoint, "find_newest", lambda folder: (tmp_path, state, ["step-8: torn"]))
    assert opened.find_checkpoint(RunFolder(tmp_path), "newest") == (tmp_path, state)
    said = capsys.readouterr()
    assert "step-8: torn" in said.err and str(tmp_path) in said.err and said.out == ""


def test_what_onnxruntime_has_no_kernel_for_is_refused_in_a_line(tmp_path):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 4)).double()
    found = trained(tmp_path, model, precision="float64")
    pytest.importorskip("onnxruntime")
    with pytest.raises(RunError, match="onnxruntime cannot run it"):
        export(found, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []

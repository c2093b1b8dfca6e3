"""Plots of docs/results are drawn from the data beside them, and say which command and commit measured it."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hpc_lbsgd import cli

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
PICTURES = sorted(RESULTS.rglob("*.png"))


def tool(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


figures, draw_ideas = tool("figures"), tool("draw_ideas")


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved."""
    found = []
    saved = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (found.append(self), saved(self, *a, **k)))
    return found


def overlaps(figure) -> list[str]:
    """Tick labels that lie on one another, and labels that lie outside of the figure."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    wrong = []
    for axis in figure.axes:
        for labels in (axis.get_xticklabels(), axis.get_yticklabels()):
            texts = [t for t in labels if t.get_text() and t.get_visible() and not t.get_rotation()]
            boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in texts]
            inside = [(n, b) for n, b in boxes if axis.bbox.x0 - b.width <= b.x0 <= axis.bbox.x1]
            wrong += [f"{a} on {b}" for (a, x), (b, y) in zip(inside, inside[1:], strict=False) if x.overlaps(y)]
    for text in figure.texts:
        box = text.get_window_extent(renderer)
        wrong += [text.get_text()] if box.x1 > figure.bbox.x1 or box.y0 < 0 else []
    return wrong


@pytest.mark.parametrize("picture", PICTURES, ids=lambda p: p.stem)
def test_each_plot_has_its_data_and_is_drawn_again_from_it(picture, tmp_path, drawn):
    data = picture.with_suffix(".json")
    made = json.loads(data.read_text())
    assert re.fullmatch(r"[0-9a-f]{7,}", made["commit"])
    words = made["command"].split()
    assert words[0] == "hpc-lbsgd" and cli.parser().parse_args(words[1:])
    figures.draw(data, tmp_path / picture.name)
    (figure,) = drawn
    said = " ".join(text.get_text().replace("\n", " ") for text in figure.texts)
    assert made["command"] in said and f"commit {made['commit']}" in said
    assert overlaps(figure) == []


def test_there_are_as_many_plots_as_data():
    assert len(PICTURES) > 5 and {p.with_suffix(".json") for p in PICTURES} == set(RESULTS.rglob("*.json"))


def test_the_manuals_pictures_are_drawn_again(tmp_path, drawn):
    draw_ideas.main(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in draw_ideas.PICTURES.glob("*.png"))
    assert not [wrong for figure in drawn for wrong in overlaps(figure)]

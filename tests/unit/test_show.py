"""`data show`: what is on the sheet is what a run would see, and a page needs no other file."""

import base64
import io
import json
import re

import numpy as np
import pytest
import torch
from conftest import SMALL_RECIPE, changed, command, write_images, write_recipe
from PIL import Image

from hpc_lbsgd.cli import main
from hpc_lbsgd.data import loader, show, table
from hpc_lbsgd.data import tree as trees
from hpc_lbsgd.data.storage import Request
from hpc_lbsgd.recipe import Data

GREY = {"channels": 1, "mean": [100.0], "std": [50.0]}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Grey pictures in four classes; one class has a single image, and a name for pages to stumble over."""
    root = write_images(tmp_path_factory.mktemp("small") / "d", 23, 16, suffix=".png")
    (root / "<b>$x_1$").mkdir()
    Image.new("L", (16, 16), 9).save(root / "<b>$x_1$" / "a.png")
    return trees.index(root, processes=1)


@pytest.mark.parametrize("kind", ["torchvision", "dali"])
def test_the_sheet_shows_what_a_run_sees(small, kind):
    data = Data(loader=kind, image_size=16, augment="pad-crop", eval_resize=0, **GREY)
    shown = show.look(small, data, 5, 10)
    assert np.unique(small.labels[shown.samples]).tolist() == [0, 1, 2, 3, 4]
    assert np.bincount(small.labels[shown.samples]).tolist() == [1, 2, 2, 2, 2]
    made = loader.create(data, small, 5, True, 16, 1, 1, False, torch.device("cpu"))
    for epoch, batch in enumerate(made.batches(Request(e, shown.samples) for e in range(show.EPOCHS))):
        seen = (batch.inputs * 50 + 100).round().permute(0, 2, 3, 1).numpy()
        assert (seen == shown.seen[epoch]).all()
    assert not (shown.seen[0] == shown.seen[1]).all() and (shown.stored[0] == 9).all()


def test_classes_and_samples_are_chosen_evenly_and_by_the_seed(small):
    two = show.chosen(small, 2, 0)
    assert sorted(set(small.labels[two])) == [0, 4]
    assert any((show.chosen(small, 5, s) != show.chosen(small, 5, 0)).any() for s in range(1, 6))
    assert (show.chosen(small, 5, 3) == show.chosen(small, 5, 3)).all()


def test_both_files_are_written_and_stand_alone(small, tmp_path):
    section = changed(SMALL_RECIPE, data__image_size=16)
    recipe = write_recipe(tmp_path / "r.yaml", section)
    words = ("--recipe", recipe, "--set", "data.augment=flip", "--json")
    job = command("data", "show", small.path, "--png", tmp_path / "a.png", "--html", tmp_path / "a.html", *words)
    assert job.returncode == 0, job.stderr
    assert json.loads(job.stdout)["written"] == [str(tmp_path / "a.png"), str(tmp_path / "a.html")]
    picture = Image.open(tmp_path / "a.png")
    assert min(picture.size) > 700 and len(np.unique(np.asarray(picture.convert("L")))) > 100
    page = (tmp_path / "a.html").read_text()
    assert "flip to 16 pixels" in page and "24 images in 5 classes" in page
    assert "&lt;b&gt;$x_1$" in page and "<b>$" not in page
    assert "WARNING:</b> 1 of 5 classes with a single image" in page
    assert not re.search(r"(src|href)=(?!.data:image/png;base64,)", page)
    pictures = re.findall(r"base64,([^\"]+)", page)
    assert len(pictures) == 2 and all(Image.open(io.BytesIO(base64.b64decode(p))).width > 700 for p in pictures)


def test_photos_of_many_sizes_without_a_recipe(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(4):
        (tmp_path / "d" / f"c{i % 2}").mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8))
        coarse.resize((60 + 40 * i, 90)).save(tmp_path / "d" / f"c{i % 2}" / f"{i}.jpg")
    m = trees.index(tmp_path / "d", processes=1)
    shown = show.show(tmp_path / "d", None, 0, 10, tmp_path / "x.png", None)
    assert shown.seen.shape == (show.EPOCHS, 4, 224, 224, 3) and Image.open(tmp_path / "x.png")
    assert [s.shape[1] for s in shown.stored] == m.widths[shown.samples].tolist()
    assert show.squared(shown.stored[0]).shape[0] == show.squared(shown.stored[0]).shape[1]


@pytest.mark.parametrize("words, says", [
    ((), "say where to write, with --png FILE or --html FILE"),
    (("--png", "x.png", "--set", "seed=1"), "--set changes a recipe: name one with --recipe"),
    (("--png", "x.png", "--recipe", "fashion-mnist"), "data.image_size = 28, but 24 of 24 images have another size"),
    (("--png", "nowhere/x.png", "--recipe", "fashion-mnist", "--set", "data.image_size=16"), "cannot write"),
])  # fmt: skip
def test_what_cannot_be_shown_is_refused(small, tmp_path, words, says, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["data", "show", str(small.path), *words]) == 2 and says in capsys.readouterr().err


def test_a_set_with_nothing_left_is_refused(tmp_path, capsys):
    trees.index(write_images(tmp_path / "d", 2, 8, classes=2), processes=1)
    (tmp_path / "d" / "exclude.txt").write_text("class-0/0000.png\nclass-1/0001.png\n")
    assert main(["data", "show", str(tmp_path / "d"), "--png", str(tmp_path / "x.png")]) == 2
    assert "exclude.txt beside it leaves no image" in capsys.readouterr().err


def test_fields_may_have_any_names(tmp_path):
    """matplotlib sets what is between dollar signs as a formula."""
    m = trees.index(write_images(tmp_path / "d", 4, 8), processes=1)
    rows = "".join(f"d/{m.key(i)},{i},{i}\n" for i in range(4))
    (tmp_path / "t.csv").write_text(f"path,a $,b__c__d $\n{rows}")
    found = table.index(tmp_path / "t.csv", processes=1)
    show.show(found.path, None, 0, 2, tmp_path / "x.png", None)
    assert Image.open(tmp_path / "x.png").width > 700

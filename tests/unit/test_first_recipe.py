"""`init`: what it makes of folders, and that its recipe is one."""

import json
import shlex

import numpy as np
import pytest
import yaml
from conftest import command, write_images

from hpc_lbsgd import first_recipe, recipe
from hpc_lbsgd.data import tree
from hpc_lbsgd.data.manifest import Manifest
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.first_recipe import Facts, choose, hold_out


def facts(samples=1000, side=300, as_they_are=False):
    return Facts("train.arrow", "eval.arrow", True, samples, 10, side, as_they_are, 3, [127.0] * 3, [60.0] * 3)


@pytest.mark.parametrize("samples", [9, 20, 324, 5000, 60_000, 1_281_167])
@pytest.mark.parametrize("small", [True, False])
def test_every_size_of_set_gets_a_schedule_that_ends_low(samples, small):
    c = choose(facts(samples), small)
    assert c.k >= 2 and c.n * c.k <= 256 and 2 * c.n * c.k <= max(16, samples)
    assert c.milestones == sorted(set(c.milestones)) and len(c.milestones) == 3 and c.milestones[-1] < c.epochs
    steps = -(-samples // (c.n * c.k)) * c.epochs
    assert steps >= 4000 or c.epochs == 200


@pytest.mark.parametrize(
    ("side", "as_they_are", "small", "wanted"),
    [
        (32, True, False, ("resnet20", 32, 0, "pad-crop")),
        (64, True, False, ("resnet20", 64, 0, "flip")),
        (500, False, False, ("resnet50", 224, 256, "resized-crop")),
        (150, False, False, ("resnet50", 128, 146, "resized-crop")),
        (500, False, True, ("resnet20", 64, 73, "resized-crop")),
        (20, False, False, ("resnet20", 32, 37, "resized-crop")),
    ],
)
def test_what_the_model_sees_follows_from_the_images(side, as_they_are, small, wanted):
    c = choose(facts(side=side, as_they_are=as_they_are), small)
    assert (c.model, c.image_size, c.eval_resize, c.augment) == wanted


def test_a_tenth_of_each_class_is_held_out_and_never_a_class_s_only_image():
    labels = np.array([0] * 50 + [1] * 2 + [2] * 1 + [0] * 50)
    chosen = hold_out(labels, 3)
    assert [int(chosen[labels == c].sum()) for c in range(3)] == [10, 1, 0]
    assert (chosen == hold_out(labels, 3)).all()


def test_images_that_came_since_the_index_are_not_passed_over(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    root = write_images(tmp_path / "photos", 40, 16, classes=2)
    (root / "beside.png").write_bytes((root / "class-0" / "0000.png").read_bytes())  # of no class, and passed over
    first_recipe.init(root, tmp_path / "one.yaml", False, False, processes=1)
    first_recipe.init(root, tmp_path / "two.yaml", False, False, processes=1)
    assert "the 40 images as they were listed on" in capsys.readouterr().err
    (root / "class-1" / "new one.png").write_bytes((root / "class-0" / "0000.png").read_bytes())
    (root / "class-1" / "notes.txt").write_text("no image")
    with pytest.raises(
        RequestError, match=r"1 images came since .*data index .*photos.*\n.*class-1/new one.png"
    ) as refused:
        first_recipe.init(root, tmp_path / "three.yaml", False, False, processes=1)
    assert not (tmp_path / "three.yaml").exists() and "beside" not in str(refused.value)
    tree.index(root, processes=1)
    first_recipe.init(root, tmp_path / "three.yaml", False, False, processes=1)
    assert recipe.read("three.yaml").data.samples == 37


def test_images_that_were_left_out_do_not_count_as_new(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = write_images(tmp_path / "photos", 40, 16, classes=2)
    (root / "class-1" / "broken.png").write_bytes(b"no picture")
    for name in ("one.yaml", "two.yaml"):
        first_recipe.init(root, tmp_path / name, False, True, processes=1)
    assert (tmp_path / "two.yaml").exists()


def test_a_folder_of_classes_becomes_a_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "my photos", 120, 40, classes=3)
    out = first_recipe.init(tmp_path / "my photos", None, small=False, exclude=False, processes=1)
    made = recipe.read(str(out))
    train, evaluation = Manifest(made.data.train), Manifest(made.data.eval)
    assert (len(train), len(evaluation)) == (108, 12) == (made.data.samples, 12)
    assert np.bincount(evaluation.labels).tolist() == [4, 4, 4]
    both = {m.key(i) for m in (train, evaluation) for i in range(len(m))}
    assert len(both) == 120, "a sample is in both parts, or in none"
    assert made.data.channels == 1 and made.data.image_size == 40 and made.determinism == "any-ranks"
    pixels = np.stack([np.asarray(open_image(train.file(i))) for i in range(len(train))])
    assert made.data.mean == [pytest.approx(pixels.mean(), abs=0.01)]
    assert made.data.std == [pytest.approx(pixels.std(), abs=0.01)]
    schedule = made.build_schedule(made.data.samples)
    assert schedule.at(schedule.steps - 1).lr == pytest.approx(schedule.at(0).lr / 1000)  # never falls to nothing
    with pytest.raises(RequestError, match="is there already"):
        first_recipe.init(tmp_path / "my photos", None, False, False, 1)


def open_image(path):
    from PIL import Image

    return Image.open(path)


def test_parts_that_a_set_brings_are_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "set" / "train", 40, 16)
    write_images(tmp_path / "set" / "val", 12, 24, seed=3)
    made = recipe.read(str(first_recipe.init(tmp_path / "set", None, False, False, 1)))
    assert len(Manifest(f"{made.data.train}")) == 40 and len(Manifest(f"{made.data.eval}")) == 12
    assert made.data.eval_resize > 0, "parts of two sizes must be resized"


@pytest.mark.parametrize("kind", ["nothing", "empty", "one class", "single images", "a bad image"])
def test_what_cannot_become_a_recipe_is_refused_by_name(tmp_path, kind):
    folder = tmp_path / "photos"
    if kind == "empty":
        folder.mkdir()
    elif kind == "one class":
        write_images(folder, 4, 16, classes=1)
    elif kind == "single images":
        write_images(folder, 3, 16, classes=3)
    elif kind == "a bad image":
        write_images(folder, 8, 16)
        (folder / "class-0" / "bad.png").write_bytes(b"none")
    done = command("init", folder, "--out", tmp_path / "r.yaml")
    assert done.returncode == 2 and "Traceback" not in done.stderr and str(folder) in done.stderr
    assert not (tmp_path / "r.yaml").exists()
    if kind == "a bad image":
        assert (
            "--exclude" in done.stderr
            and command("init", folder, "--exclude", "--out", tmp_path / "r.yaml").returncode == 0
        )


def test_shipped_recipes_are_listed_with_what_they_are():
    found = json.loads(command("recipes", "--json").stdout)["recipes"]
    assert "fashion-mnist" in found and all(len(said) > 20 for said in found.values())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["schedule.kind=decaying-lr", "schedule.milestones=[]"], "never falls"),
        (["schedule.kind=constant"], "never falls"),
        (["batch.workers=512"], "64 times optim.base_batch"),
        (["schedule.kind=cosine"], None),
        (["schedule.kind=decaying-lr", "schedule.milestones=[2]"], None),
    ],
)
def test_a_plan_warns_of_a_rate_that_never_falls_or_was_never_tried(settings, said):
    from hpc_lbsgd.outline import warnings

    made = recipe.read("fashion-mnist", settings)
    found = [w for w in warnings(made, made.build_schedule(60_000)) if "never falls" in w or "base_batch" in w]
    assert len(found) == (said is not None) and all(said in w for w in found)


@pytest.mark.parametrize("name", ["a: b #1", 'it\'s "x"', "photos \U0001f600", "two\nlines", "-", "\x7f\u2028 ü"])
def test_any_name_of_a_folder_is_read_back(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / name, 16, 16, classes=2)
    out = first_recipe.init(tmp_path / name, None, False, False, 1)
    made = recipe.read(str(out))
    assert Manifest(made.data.train).root == tmp_path / name and made == recipe.validate(yaml.safe_load(made.to_yaml()))
    pasted = first_recipe.show(out).split("next:")[1].strip()
    assert shlex.split(pasted)[:3] == ["hpc-lbsgd", "plan", str(out)]


def test_init_says_before_it_decodes_where_it_cannot_write_and_that_a_list_is_an_old_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "photos", 16, 16, classes=2)
    with pytest.raises(RequestError, match="no such folder"):
        first_recipe.init(tmp_path / "photos", tmp_path / "none" / "r.yaml", False, False, 1)
    assert not list(tmp_path.rglob("*.arrow"))
    first_recipe.init(tmp_path / "photos", None, False, False, 1)
    assert "as they were listed" not in capsys.readouterr().err
    first_recipe.init(tmp_path / "photos", tmp_path / "r.yaml", False, False, 1)
    assert "the 16 images as they were listed" in capsys.readouterr().err

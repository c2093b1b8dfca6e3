"""Inputs and targets that are not one image and one class: the same weights from table, tar, pack and stage, on 1 and 3
ranks, across a resume."""

import json
import os

import numpy as np
import pytest
from conftest import SAMPLES, changed, command, records, train_many
from PIL import Image
from store import store

from hpc_lbsgd.data import archive, manifest, own, pack, shards, table

RANKS = (1, 3)
WANTED = ["class", "age", "tags", "mask", "boxes", "right:image", "caption:text", "sound:bytes"]
EXACT = {"determinism": "any-ranks", "train__max_steps": None, "train__epochs": 2, "batch__workers": 5}
ALIKE = [("table", "packed"), ("tags",), ("both",), ("mask", "mask-packed"), ("boxes",),
         ("own", "own-packed", "own-afar"),
         ("several", "several-staged", "several-raw", "several-tar", "several-afar")]  # fmt: skip
RESUMED = ("several-tar", "own-packed")


@pytest.fixture(scope="module")
def afar(tmp_path_factory):
    with store(tmp_path_factory.mktemp("fields")) as serving:
        yield serving


@pytest.fixture(scope="module")
def recipes(small_recipe, small_data, tmp_path_factory, afar):
    """{variant: recipe}: 203 samples in 6 steps an epoch, with a tail of three."""
    os.environ["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    root, paths = afar.root, {}
    for part in ("train", "eval"):
        m = manifest.Manifest(small_data / part / "manifest.arrow")
        rng = np.random.default_rng(len(m))
        rows = []
        for i in range(len(m)):
            age = float(m.labels[i] + rng.normal(0, 0.1))
            tags = [bool(m.labels[i] & 1), bool(m.labels[i] & 2), bool(m.labels[i] == 0)]
            mask = root / f"{part}-{i}.png"
            Image.open(m.file(i)).point(lambda grey: grey > 127).save(mask)
            right, sound = root / f"{part}-{i}-right.bmp", root / f"{part}-{i}.raw"
            Image.open(m.file(i)).transpose(Image.Transpose.ROTATE_180).save(right)
            sound.write_bytes(b"\7" * (i % 4))
            row = {"path": m.file(i), "class": m.classes[m.labels[i]], "age": age, "tags": tags, "mask": str(mask)}
            row["boxes"] = [[0, 0, 2 + int(m.labels[i]), 4, 1]] * (i % 3)
            row |= {"right": str(right), "sound": str(sound), "caption": f"№ {m.labels[i]}, {i}"}
            rows.append(json.dumps(row))
        (root / f"{part}.jsonl").write_text("\n".join(rows))
        top = tmp_path_factory.getbasetemp()
        paths[part] = table.index(root / f"{part}.jsonl", processes=1, root=top, wanted=WANTED).path
    packed, raw, tars, signals = {}, {}, {}, {}
    for part, path in paths.items():
        packed[part] = pack.pack(path, root / "packed" / part, pack.Encoding(), 0.2, 1).path
        raw[part] = pack.pack(path, root / "raw" / part, pack.Encoding("raw", channels=1), 0.2, 1).path
        tar = root / "tars" / part / "manifest.arrow"
        tar.parent.mkdir(parents=True)
        for other in [*packed[part].parent.glob("*.tar"), packed[part].parent / "classes.txt"]:
            (tar.parent / other.name).symlink_to(other)
        tars[part] = archive.index(tar.parent, processes=1, wanted=WANTED).path
        signals[part] = shards.pack(own.Own("fields_models:signals", part), root / "signals" / part, 0.05, 1).path
    assert len(manifest.Manifest(paths["train"])) == SAMPLES

    def of(places, **changes):
        return changed(
            small_recipe, data__train=str(places["train"]), data__eval=str(places["eval"]), **EXACT | changes
        )

    def served(name):
        return {part: f"{afar.url}/{name}/{part}" for part in ("train", "eval")}

    masks = {"data__targets": ["mask"], "model__name": "fields_models:pixels", "train__loss": "pixel-cross-entropy"}
    numbers = {"data__targets": ["age"], "train__loss": "mse"}
    several = {"data__inputs": ["image", "right", "caption"], "data__encode": {"caption": "fields_models:letters"},
               "data__targets": ["class", "sound"], "data__classes": 5, "model__name": "fields_models:PairAndText",
               "train__loss": "fields_models:kind_and_sound"}  # fmt: skip
    mine = {"model__name": "fields_models:OfSignals", "train__loss": "fields_models:of_signals"}
    return {
        "table": of(paths, **numbers),
        "packed": of(packed, **numbers, data__loader="dali", machine__stage_dir=str(root / "stage")),
        "tags": of(packed, data__targets=["tags"], train__loss="binary-cross-entropy"),
        "mask": of(paths, **masks),
        "boxes": of(packed, data__targets=["boxes"], data__classes=2, train__loss="fields_models:how_many"),
        "mask-packed": of(packed, **masks, data__loader="dali"),
        "several": of(paths, **several),
        "several-staged": of(packed, **several, data__loader="dali", machine__stage_dir=str(root / "stage")),
        "several-raw": of(raw, **several),
        "several-tar": of(tars, **several, data__loader="dali"),
        "several-afar": of(served("packed"), **several, machine__stage_dir=str(root / "kept")),
        "own-afar": of(served("signals"), **mine),
        "own": of(paths, **mine, data__dataset="fields_models:signals"),
        "own-packed": of(signals, **mine, machine__stage_dir=str(root / "stage")),
        "both": of(packed, data__targets=["class", "age"], train__loss="fields_models:age_and_kind", data__classes=5),
    }


@pytest.fixture(scope="module")
def runs(recipes, tmp_path_factory):
    """{(variant, ranks): run folder}; `half-NAME`: begun on so many ranks, to be ended on another number."""
    root, found = tmp_path_factory.mktemp("runs"), {}
    halves = {f"half-{name}": changed(recipes[name], train__max_steps=7, checkpoint__steps=1) for name in RESUMED}
    for ranks in RANKS:
        made = train_many(ranks, recipes | (halves if ranks == 3 else {}), root)
        found |= {(name, ranks): run for name, run in made.items()}
    return found


def hash_of(run):
    return records(run, "end")[-1]["weights_sha256"]


@pytest.mark.parametrize("names", ALIKE)
def test_the_same_weights_wherever_and_however_many(runs, names):
    assert len({hash_of(runs[name, ranks]) for name in names for ranks in RANKS}) == 1


def test_what_is_learnt_is_said(runs):
    for name in ("table", "tags", "both", "mask"):
        evaluations = records(runs[name, 3], "eval")
        assert all(r["accuracy"] is None and r["samples"] == 61 for r in evaluations)
        assert evaluations[-1]["loss"] < records(runs[name, 3], "epoch")[0]["loss"], name


@pytest.mark.parametrize("name", RESUMED)
def test_a_resume_on_another_number_of_ranks(runs, recipes, tmp_path, name):
    whole = changed(recipes[name], checkpoint__steps=1)
    (tmp_path / "r.json").write_text(json.dumps(whole))
    half = runs[f"half-{name}", 3]
    done = command("train", tmp_path / "r.json", "--run", half, "--resume")
    assert done.returncode == 0 and hash_of(half) == hash_of(runs[name, 1]), done.stderr


def test_a_run_is_asked_again(runs):
    asked = command("evaluate", runs["table", 1], "--json")
    assert json.loads(asked.stdout)["loss"] == records(runs["table", 1], "eval")[-1]["loss"], asked.stderr
    refused = command("predict", runs["table", 1], "tests/conftest.py")
    assert refused.returncode == 2 and "trained for age, not for one class an image" in refused.stderr

"""Targets that are not one class: the same weights from table, pack and stage, on 1 and 3 ranks, across a resume."""

import json
import os

import numpy as np
import pytest
from conftest import SAMPLES, changed, command, records, train_many
from PIL import Image

from hpc_lbsgd.data import manifest, pack, table

RANKS = (1, 3)
EXACT = {"determinism": "any-ranks", "train__max_steps": None, "train__epochs": 2, "batch__workers": 5}


@pytest.fixture(scope="module")
def recipes(small_recipe, small_data, tmp_path_factory):
    """{variant: recipe}: 203 samples in 6 steps an epoch, with a tail of three."""
    os.environ["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    root = tmp_path_factory.mktemp("fields")
    paths = {}
    for part in ("train", "eval"):
        m = manifest.Manifest(small_data / part / "manifest.arrow")
        rng = np.random.default_rng(len(m))
        rows = []
        for i in range(len(m)):
            age = float(m.labels[i] + rng.normal(0, 0.1))
            tags = [bool(m.labels[i] & 1), bool(m.labels[i] & 2), bool(m.labels[i] == 0)]
            mask = root / f"{part}-{i}.png"
            Image.open(m.file(i)).point(lambda grey: grey > 127).save(mask)
            row = {"path": m.file(i), "class": m.classes[m.labels[i]], "age": age, "tags": tags, "mask": str(mask)}
            row["boxes"] = [[0, 0, 2 + int(m.labels[i]), 4, 1]] * (i % 3)
            rows.append(json.dumps(row))
        (root / f"{part}.jsonl").write_text("\n".join(rows))
        paths[part] = table.index(root / f"{part}.jsonl", processes=1, root=tmp_path_factory.getbasetemp()).path
    packed = {
        part: pack.pack(path, root / "packed" / part, pack.Encoding(), 0.05, 1).path for part, path in paths.items()
    }
    assert len(manifest.Manifest(paths["train"])) == SAMPLES

    def of(places, **changes):
        return changed(
            small_recipe, data__train=str(places["train"]), data__eval=str(places["eval"]), **EXACT | changes
        )

    masks = {"data__targets": ["mask"], "model__name": "fields_models:pixels", "train__loss": "pixel-cross-entropy"}
    numbers = {"data__targets": ["age"], "train__loss": "mse"}
    return {
        "table": of(paths, **numbers),
        "packed": of(packed, **numbers, data__loader="dali", machine__stage_dir=str(root / "stage")),
        "tags": of(packed, data__targets=["tags"], train__loss="binary-cross-entropy"),
        "mask": of(paths, **masks),
        "boxes": of(packed, data__targets=["boxes"], data__classes=2, train__loss="fields_models:how_many"),
        "mask-packed": of(packed, **masks, data__loader="dali"),
        "both": of(packed, data__targets=["class", "age"], train__loss="fields_models:age_and_kind", data__classes=5),
    }


@pytest.fixture(scope="module")
def runs(recipes, tmp_path_factory):
    """{(variant, ranks): run folder}; `half`: begun on so many ranks, ended on the other number."""
    root, found = tmp_path_factory.mktemp("runs"), {}
    half = changed(recipes["both"], train__max_steps=7, checkpoint__steps=1)
    for ranks in RANKS:
        made = train_many(ranks, recipes | {"half": half}, root)
        found |= {(name, ranks): run for name, run in made.items()}
    return found


def hash_of(run):
    return records(run, "end")[-1]["weights_sha256"]


@pytest.mark.parametrize("names", [("table", "packed"), ("tags",), ("both",), ("mask", "mask-packed"), ("boxes",)])
def test_the_same_weights_wherever_and_however_many(runs, names):
    assert len({hash_of(runs[name, ranks]) for name in names for ranks in RANKS}) == 1


def test_what_is_learnt_is_said(runs):
    for name in ("table", "tags", "both", "mask"):
        evaluations = records(runs[name, 3], "eval")
        assert all(r["accuracy"] is None and r["samples"] == 61 for r in evaluations)
        assert evaluations[-1]["loss"] < records(runs[name, 3], "epoch")[0]["loss"], name


def test_a_resume_on_another_number_of_ranks(runs, recipes, tmp_path):
    whole = changed(recipes["both"], checkpoint__steps=1)
    (tmp_path / "r.json").write_text(json.dumps(whole))
    half = runs["half", 3]
    done = command("train", tmp_path / "r.json", "--run", half, "--resume")
    assert done.returncode == 0 and hash_of(half) == hash_of(runs["both", 1]), done.stderr


def test_a_run_is_asked_again(runs):
    asked = command("evaluate", runs["table", 1], "--json")
    assert json.loads(asked.stdout)["loss"] == records(runs["table", 1], "eval")[-1]["loss"], asked.stderr
    refused = command("predict", runs["table", 1], "tests/conftest.py")
    assert refused.returncode == 2 and "trained for age, not for one class an image" in refused.stderr

"""Where the pictures lie does not matter: folder, tar, raw, staged, on any number of ranks, bad images or not."""

import shutil

import pytest
from conftest import changed, records, train_many

from hpc_lbsgd.data import manifest, pack

RANKS = (1, 3)
EXACT = {"determinism": "any-ranks", "train__max_steps": None, "train__epochs": 2, "batch__workers": 5}


@pytest.fixture(scope="module")
def runs(small_recipe, small_data, tmp_path_factory):
    """{(variant, ranks): run folder}"""
    root = tmp_path_factory.mktemp("storage")
    places = {"folder": {}}
    for name, encoding in (("tar", pack.Encoding()), ("raw", pack.Encoding("raw", channels=1))):
        for part in ("train", "eval"):
            pack.pack(small_data / part, root / name / part, encoding, 0.02, 1)
        places[name] = {"data__train": str(root / name / "train"), "data__eval": str(root / name / "eval")}
    places["staged"] = places["tar"] | {"machine__stage_dir": str(root / "stage")}
    shutil.copytree(small_data / "train", root / "spoiled")
    spoiled = manifest.Manifest(root / "spoiled/manifest.arrow")
    for sample in (3, 77, 150):
        with open(spoiled.file(sample), "r+b") as f:
            f.write(b"\0" * int(spoiled.sizes[sample]))
    places["skip"] = {"data__train": str(root / "spoiled"), "data__on_bad_image": "skip", "data__loader": "dali"}
    found = {}
    for ranks in RANKS:
        recipes = {name: changed(small_recipe, **EXACT | changes) for name, changes in places.items()}
        found |= {(name, ranks): run for name, run in train_many(ranks, recipes, root).items()}
    return found


def hash_of(run):
    return records(run, "end")[-1]["weights_sha256"]


@pytest.mark.parametrize("name", ["tar", "raw", "staged"])
def test_the_same_weights_wherever_the_pictures_lie(runs, name):
    assert len({hash_of(runs[place, ranks]) for place in ("folder", name) for ranks in RANKS}) == 1


def test_stand_ins_are_the_same_on_any_number_of_ranks(runs):
    assert len({hash_of(runs["skip", ranks]) for ranks in RANKS}) == 1
    for ranks in RANKS:
        assert [r["replaced"] for r in records(runs["skip", ranks], "epoch")] == [3, 3]
    assert hash_of(runs["skip", 1]) != hash_of(runs["folder", 1])

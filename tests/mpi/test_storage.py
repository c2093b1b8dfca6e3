"""Where the pictures lie does not matter: folder, tar, raw, staged, afar, kept in part, on any number of ranks, bad
images or not, across a resume."""

import itertools
import shutil

import pytest
from conftest import changed, command, mpirun, records, train_many, write_images
from store import Store, store

from hpc_lbsgd.data import manifest, pack
from hpc_lbsgd.data import tree as trees

RANKS = (1, 3)
EXACT = {"determinism": "any-ranks", "train__max_steps": None, "train__epochs": 2, "batch__workers": 5}
ROOM = 60 * 4096  # bytes: of 264 samples


@pytest.fixture(scope="module")
def afar(tmp_path_factory):
    with store(tmp_path_factory.mktemp("storage")) as serving:
        yield serving


@pytest.fixture(scope="module")
def recipes(small_recipe, small_data, afar):
    root, places = afar.root, {"folder": {}}
    for name, encoding in (("tar", pack.Encoding()), ("raw", pack.Encoding("raw", channels=1))):
        for part in ("train", "eval"):
            pack.pack(small_data / part, root / name / part, encoding, 0.02, 1)
        places[name] = {"data__train": str(root / name / "train"), "data__eval": str(root / name / "eval")}
    places["staged"] = places["tar"] | {"machine__stage_dir": str(root / "stage")}
    places["afar"] = {f"data__{part}": f"{afar.url}/raw/{part}" for part in ("train", "eval")}
    kept = {f"data__{part}": f"{afar.url}/tar/{part}" for part in ("train", "eval")}
    places["kept"] = kept | {"machine__stage_dir": str(root / "kept"), "data__loader": "dali"}
    places["kept in part"] = kept | {"machine__stage_dir": str(root / "part"), "machine__stage_gb": ROOM / 1e9}
    shutil.copytree(small_data / "train", root / "spoiled")
    spoiled = manifest.Manifest(root / "spoiled/manifest.arrow")
    for sample in (3, 77, 150):
        with open(spoiled.file(sample), "r+b") as f:
            f.write(b"\0" * int(spoiled.sizes[sample]))
    places["skip"] = {"data__train": str(root / "spoiled"), "data__on_bad_image": "skip", "data__loader": "dali"}
    return {name: changed(small_recipe, **EXACT | changes) for name, changes in places.items()}


@pytest.fixture(scope="module")
def runs(recipes, afar, tmp_path_factory):
    """{(variant, ranks): run folder}; `half`: begun on 3 ranks, to be ended on one."""
    root, found = tmp_path_factory.mktemp("runs"), {}
    half = {"half": changed(recipes["kept in part"], train__max_steps=7, checkpoint__steps=1)}
    for ranks in reversed(RANKS):
        made = train_many(ranks, recipes | (half if ranks == 3 else {}), root)
        found |= {(name, ranks): run for name, run in made.items()}
    return found


def hash_of(run):
    return records(run, "end")[-1]["weights_sha256"]


@pytest.mark.parametrize("name", ["tar", "raw", "staged", "afar", "kept", "kept in part"])
def test_the_same_weights_wherever_the_pictures_lie(runs, name):
    assert len({hash_of(runs[place, ranks]) for place in ("folder", name) for ranks in RANKS}) == 1


def test_a_set_afar_goes_on_and_is_kept_within_its_bound(runs, recipes, afar, tmp_path):
    def copies(name):
        return list((afar.root / name).glob("*-samples/*/*.0"))

    assert len(copies("kept")) == 264 and 0 < sum(-(-p.stat().st_size // 4096) * 4096 for p in copies("part")) <= ROOM
    (tmp_path / "r.yaml").write_text(runs["half", 3].joinpath("recipe.yaml").read_text())
    before = afar.bytes_sent
    done = command("train", tmp_path / "r.yaml", "--run", runs["half", 3], "--resume", "--set", "train.max_steps=null",
                   "--set", f"machine.stage_dir={afar.root / 'kept'}", "--set", "machine.stage_gb=null")  # fmt: skip
    assert done.returncode == 0 and hash_of(runs["half", 3]) == hash_of(runs["folder", 1]), done.stderr
    assert afar.bytes_sent - before <= 2  # of all that the node has, nothing is fetched again


def test_ranks_that_see_different_sets_do_not_evaluate_together(runs, afar, tmp_path, monkeypatch):
    """Each asks the server for itself, and the set may be replaced in between."""
    for seed in (0, 1):
        index = trees.index(write_images(tmp_path / f"d{seed}", 40, 8, seed=seed), processes=1).path
        pack.pack(index, afar.root / f"seen-{seed}", pack.Encoding(), 5, 1)
    file, asked = Store.file, itertools.count()

    def in_turn(self, path, send):
        seed = next(asked) if send and path == "/seen/manifest.arrow" else 0
        return file(self, path.replace("/seen/", f"/seen-{seed}/"), send)

    monkeypatch.setattr(Store, "file", in_turn)
    refused = mpirun(2, "-m", "hpc_lbsgd.cli", "evaluate", runs["folder", 1], f"{afar.url}/seen")
    assert refused.returncode == 2 and "Traceback" not in refused.stderr and next(asked) == 2, refused.stderr
    assert "data" in refused.stderr and "copy the data there again" in refused.stderr


def test_stand_ins_are_the_same_on_any_number_of_ranks(runs):
    assert len({hash_of(runs["skip", ranks]) for ranks in RANKS}) == 1
    for ranks in RANKS:
        assert [r["replaced"] for r in records(runs["skip", ranks], "epoch")] == [3, 3]
    assert hash_of(runs["skip", 1]) != hash_of(runs["folder", 1])

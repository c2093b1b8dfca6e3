"""`bench loader`: everyone is timed on real pictures; the report has what its readers need."""

import json

import pytest
from conftest import changed, command, mpirun, write_images, write_recipe

from hpc_lbsgd.bench.loader import measure, peers
from hpc_lbsgd.bench.loader.command import FORMATS
from hpc_lbsgd.data import pack
from hpc_lbsgd.data import tree as trees
from hpc_lbsgd.recipe import Data


def test_all_contestants_take_turns(tmp_path):
    files = write_images(tmp_path / "d", 40, 48, suffix=".jpg")
    trees.index(files, processes=1)
    pack.pack(files, tmp_path / "raw", pack.Encoding("raw"), 1.0, 1)
    job = command("bench", "loader", files, tmp_path / "raw", "--image-size", "32", "--batch", "8", "--threads", "1,2",
                  "--rounds", "2", "--images", "24", "--plot", tmp_path / "x.png", "--json")  # fmt: skip
    assert job.returncode == 0, job.stderr
    rows = json.loads(job.stdout)["rows"]
    assert len(rows) == 2 * 5 and all(len(r["values"]) == 2 and r["images_per_s"] > 0 for r in rows)
    assert {r["first_over_this"] for r in rows if r["loader"].startswith("ours, files")} == {1.0}
    assert (tmp_path / "x.png").stat().st_size > 5000
    job = command("bench", "loader", files, "--image-size", "32", "--batch", "8", "--threads", "1", "--rounds", "1",
                  "--images", "8", "--no-peers", "--limit")  # fmt: skip
    assert job.returncode == 0 and "images/s" in job.stdout and "torchvision" not in job.stdout
    assert "decoder alone, files" in job.stdout


def test_sets_whose_folders_have_one_name_are_kept_apart(tmp_path):
    for place in "ab":
        trees.index(write_images(tmp_path / place / "d", 12, 32), processes=1)
    sets = [tmp_path / "a" / "d", tmp_path / "b" / "d"]
    small = ["--image-size", "32", "--batch", "4", "--threads", "1", "--rounds", "1", "--images", "4"]
    job = command("bench", "loader", *sets, *small)
    assert job.returncode == 0 and all(f"ours, files ({path})" in job.stdout for path in sets), job.stderr
    assert "DALI file reader |" in job.stdout and f"DALI file reader ({sets[1]})" in job.stdout
    job = command("bench", "loader", sets[0], sets[0], *small)
    assert job.returncode == 2 and "twice" in job.stderr


def test_peers_make_pictures_of_the_same_shape_and_scale(tmp_path):
    """A peer that skipped resizing or normalising would be beaten unfairly."""
    m = trees.index(write_images(tmp_path / "d", 12, 48, suffix=".jpg"), processes=1)
    assert tuple(measure.FORMATS) == FORMATS  # what the command accepts, without loading them
    data = Data(image_size=32)
    for native in (False, True):
        image, label = peers.Files(m, peers.Picture(data, native))[3]
        assert image.shape == (3, 32, 32) and image.dtype.is_floating_point and abs(float(image.mean())) < 3
        assert label == m.labels[3]
    for contestant in measure.contestants([str(m.path)], data, 4, True, ["webdataset"], tmp_path, True):
        source = contestant.start(1)
        assert [next(source) for _ in range(5)] == [4] * 5
        source.close()


@pytest.mark.parametrize("words", [["nowhere"], ["--threads", "0"], ["--formats", "ffcv,zip"]])
def test_wrong_requests_are_refused(tmp_path, words):
    job = command("bench", "loader", *(words if words[0] == "nowhere" else [tmp_path, *words]))
    assert job.returncode == 2 and "Traceback" not in job.stderr


def test_three_rates_of_a_recipe_on_two_ranks(small_recipe, tmp_path):
    recipe = write_recipe(tmp_path / "r.yaml", changed(small_recipe, batch__workers=4, determinism="any-ranks"))
    words = ["-m", "hpc_lbsgd.cli", "bench", "rates", recipe, "--rounds", "2", "--steps", "3", "--json"]
    job = mpirun(2, *words)
    assert job.returncode == 0, job.stderr
    result = json.loads(job.stdout)
    assert result["ranks"] == 2 and list(result["rates"]) == ["synthetic", "loader", "end-to-end"]
    assert all(len(r["values"]) == 2 and r["lowest"] > 0 for r in result["rates"].values())
    one = command(*words[2:-1])
    assert one.returncode == 0 and "end-to-end / synthetic" in one.stdout

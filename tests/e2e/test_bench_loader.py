"""`bench loader`: everyone is timed on real pictures; the report has what its readers need."""

import json

import pytest
from conftest import command, write_images

from hpc_lbsgd.bench import loader
from hpc_lbsgd.data import manifest, pack
from hpc_lbsgd.recipe import Data


def test_all_contestants_take_turns(tmp_path):
    files = write_images(tmp_path / "d", 40, 48, suffix=".jpg")
    manifest.index(files, processes=1)
    pack.pack(files, tmp_path / "raw", pack.Encoding("raw"), 1.0, 1)
    job = command("bench", "loader", files, tmp_path / "raw", "--image-size", "32", "--batch", "8", "--threads", "1,2",
                  "--rounds", "2", "--images", "24", "--plot", tmp_path / "x.png", "--json")  # fmt: skip
    assert job.returncode == 0, job.stderr
    rows = json.loads(job.stdout)["rows"]
    assert len(rows) == 2 * 5 and all(len(r["values"]) == 2 and r["images_per_s"] > 0 for r in rows)
    assert {r["first_over_this"] for r in rows if r["loader"].startswith("ours, files")} == {1.0}
    assert (tmp_path / "x.png").stat().st_size > 5000
    job = command("bench", "loader", files, "--image-size", "32", "--batch", "8", "--threads", "1", "--rounds", "1",
                  "--images", "8", "--no-peers")  # fmt: skip
    assert job.returncode == 0 and "images/s" in job.stdout and "torchvision" not in job.stdout


def test_peers_make_pictures_of_the_same_shape_and_scale(tmp_path):
    """A peer that skipped resizing or normalising would be beaten unfairly."""
    m = manifest.index(write_images(tmp_path / "d", 12, 48, suffix=".jpg"), processes=1)
    data = Data(image_size=32)
    for native in (False, True):
        image, label = loader.Pictures(m, data, native)[3]
        assert image.shape == (3, 32, 32) and image.dtype.is_floating_point and abs(float(image.mean())) < 3
        assert label == m.labels[3]
    for contestant in loader.contestants([str(m.path)], data, 4, peers=True):
        source = contestant.start(1)
        assert [next(source) for _ in range(5)] == [4] * 5
        source.close()


@pytest.mark.parametrize("words", [["nowhere"], ["--threads", "0"]])
def test_wrong_requests_are_refused(tmp_path, words):
    job = command("bench", "loader", *(words if words[0] == "nowhere" else [tmp_path, *words]))
    assert job.returncode == 2 and "Traceback" not in job.stderr

"""What exclude.txt and the lists of single sets take away, and from whom."""

import pytest
from conftest import command, write_images
from test_labels import tar_of

from hpc_lbsgd.data import names, stage
from hpc_lbsgd.data import tree as trees
from hpc_lbsgd.data.manifest import Manifest


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    root = write_images(tmp_path_factory.mktemp("one") / "d", 1, 16, classes=1)
    return next(root.rglob("*.png")).read_bytes()


def keys_of(m):
    return [m.key(i) for i in range(len(m))]


def test_what_is_left_out_of_one_of_several_sets_in_a_folder_is_left_out_of_that_alone(image, tmp_path):
    """One list for all took val's good b.png away, for train had a bad one of that name."""
    files = {"a.png": image, "a.cls": b"0", "b.png": b"junk", "b.cls": b"1"}
    tar_of(tmp_path / "train.tar", files)
    tar_of(tmp_path / "val.tar", files | {"b.png": image})
    for _ in range(2):
        job = command("data", "index", tmp_path / "train.tar", "--exclude")
        assert job.returncode == 0 and "1 images that train.exclude.txt names" in job.stdout, job.stderr
    job = command("data", "index", tmp_path / "val.tar")
    assert job.returncode == 0 and "exclude.txt" not in job.stdout
    train, val = (Manifest(tmp_path / f"{part}.arrow") for part in ("train", "val"))
    assert keys_of(train) == ["a.png"] and keys_of(val) == ["a.png", "b.png"]
    whole = val.fingerprint
    (tmp_path / "val.tar").write_bytes((tmp_path / "val.tar").read_bytes().replace(image, image[::-1], 1))
    job = command("data", "verify", tmp_path / "val.arrow", "--exclude")
    assert job.returncode == 0 and f"left out from now on: {tmp_path / 'val.exclude.txt'}" in job.stdout, job.stderr
    val = Manifest(val.path)
    assert keys_of(val) == ["b.png"] and val.fingerprint != whole and keys_of(Manifest(train.path)) == ["a.png"]


def test_a_list_for_all_sets_in_a_folder_still_counts_for_all(image, tmp_path):
    for part in ("train", "val"):
        tar_of(tmp_path / f"{part}.tar", {"a.png": image, "a.cls": b"0", "b.png": image, "b.cls": b"1", "c.png": image,
                                          "c.cls": b"1"})  # fmt: skip
    (tmp_path / "exclude.txt").write_text("b.png\n")
    (tmp_path / "val.exclude.txt").write_bytes(b"\xef\xbb\xbfc.png\rd.png\r\n")
    for part, left, said in (("train", ["a.png", "c.png"], "1 images that exclude.txt names"),
                             ("val", ["a.png"], "2 images that exclude.txt or val.exclude.txt names")):  # fmt: skip
        job = command("data", "index", tmp_path / f"{part}.tar")
        assert job.returncode == 0 and said in job.stdout, job.stdout + job.stderr
        assert keys_of(Manifest(tmp_path / f"{part}.arrow")) == left
    staged = stage.stage(Manifest(tmp_path / "val.arrow"), tmp_path / "node")
    assert keys_of(staged) == ["a.png"] and staged.fingerprint == Manifest(tmp_path / "val.arrow").fingerprint
    one = stage.folder_of(Manifest(tmp_path / "val.arrow"), tmp_path / "node")
    (tmp_path / "val.exclude.txt").write_text("a.png\n")
    assert stage.folder_of(Manifest(tmp_path / "val.arrow"), tmp_path / "node") != one


def test_a_folder_says_how_many_images_its_list_leaves_out(tmp_path):
    write_images(tmp_path / "d", 4, 8)
    (tmp_path / "d" / "exclude.txt").write_text("class-0/0000.png\n")
    assert trees.index(tmp_path / "d", processes=1).header["left_out"] == {"images that exclude.txt names": 1}


@pytest.mark.parametrize("line", ['"a".png\r', '"a".png\tits reason\r', '"\\"a\\".png"\tits reason\r'])
def test_a_name_with_quotes_is_the_same_by_hand_and_from_an_editor_that_ends_lines_by_two(line):
    assert names.unquoted(line) == '"a".png'


def test_a_folders_set_of_another_name_reads_its_own_list_too(image, tmp_path):
    """`verify --exclude` of it writes that; indexed again, the picture must not be one that cannot be read."""
    pictures = sorted(write_images(tmp_path / "d", 3, 8).rglob("*.png"))
    out = tmp_path / "d" / "train.arrow"
    trees.index(tmp_path / "d", out=out, processes=1)
    pictures[0].write_bytes(b"junk")
    (tmp_path / "d" / "train.exclude.txt").write_text(f"{pictures[0].relative_to(tmp_path / 'd')}\n")
    again = trees.index(tmp_path / "d", out=out, processes=1)
    assert len(again) == 2 and list(again.header["left_out"].values()) == [1]

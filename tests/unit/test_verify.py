"""What `data verify` finds in a folder where everything that can be wrong is."""

import json
import shutil

import numpy as np
import pytest
from conftest import command, write_images
from PIL import Image

from hpc_lbsgd.data import manifest, names, pack, verify
from hpc_lbsgd.data import tree as trees


@pytest.fixture
def messy(tmp_path):
    """30 good colour pictures, and one of each kind of trouble."""
    root = tmp_path / "d"
    write_images(root, 30, 16, suffix=".jpg")
    for path in root.rglob("*.jpg"):
        Image.open(path).convert("RGB").save(path)
    c0 = root / "class-0"
    good = sorted(c0.glob("*.jpg"))[0]
    (c0 / "empty.jpg").write_bytes(b"")
    (c0 / "cut.jpg").write_bytes(good.read_bytes()[:-30])
    (c0 / "noise.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 200)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (16, 16, 4), dtype=np.uint8), "CMYK").save(c0 / "print.jpg")
    Image.fromarray(rng.integers(0, 65535, (16, 16), dtype=np.uint16)).save(c0 / "deep.png")
    Image.fromarray(rng.integers(0, 255, (16, 16), dtype=np.uint8)).save(c0 / "grey.png")
    Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(c0 / "really-png.jpg", format="PNG")
    shutil.copy(good, root / "class-1" / "twice.jpg")
    return root


EXPECTED = {
    ("class-0/empty.jpg", "empty"), ("class-0/cut.jpg", "truncated"), ("class-0/noise.png", "corrupt"),
    ("class-0/print.jpg", "cmyk"), ("class-0/deep.png", "16-bit"), ("class-0/grey.png", "grey"),
    ("class-0/really-png.jpg", "extension"), ("class-1/twice.jpg", "duplicate"),
}  # fmt: skip


def test_everything_is_found_and_named(messy):
    found = verify.verify(messy, processes=2)
    assert {(f.path, f.kind) for f in found.findings} == EXPECTED and found.samples == 38


def test_what_cannot_be_used_is_left_out_from_then_on(messy):
    assert command("data", "index", messy).returncode == 2
    job = command("data", "verify", messy, "--json")
    assert job.returncode == 1 and json.loads(job.stdout)["unusable"] == 3
    job = command("data", "verify", messy, "--exclude")
    assert job.returncode == 0 and "exclude.txt" in job.stdout
    assert len((messy / "exclude.txt").read_text().splitlines()) == 3
    assert command("data", "index", messy).returncode == 0
    m = manifest.Manifest(messy / "manifest.arrow")
    assert len(m) == 35
    again = verify.verify(messy, processes=1)  # now by the manifest
    assert not again.unusable and again.samples == 35


def test_a_manifest_honours_its_list_and_is_another_set_then(tmp_path):
    root = write_images(tmp_path / "d", 20, 16)
    m = trees.index(root, processes=1)
    with open(m.file(4), "r+b") as f:
        f.seek(50)
        f.write(b"\0\0\0\0")
    job = command("data", "verify", root / "manifest.arrow", "--exclude", "--json")
    assert job.returncode == 0 and json.loads(job.stdout)["counts"] == {"changed": 1}
    now = manifest.Manifest(root / "manifest.arrow")
    assert len(now) == 19 and now.fingerprint != m.fingerprint
    assert m.key(4) not in [now.key(i) for i in range(19)]
    assert [now.file(i) for i in range(19)] == [m.file(i) for i in range(20) if i != 4]
    packed = pack.pack(root, tmp_path / "packed", pack.Encoding(), 1.0, 1)
    assert len(packed) == 19 and packed.fingerprint == now.fingerprint


@pytest.mark.parametrize("before", [b"class-0/0000.png", b"\xef\xbb\xbfclass-0/0000.png\r\n"])
def test_a_list_that_a_person_wrote_is_read_and_added_to(tmp_path, before):
    """Editors leave the last line without its end, or begin the file with a mark."""
    root = write_images(tmp_path / "d", 8, 16)
    m = trees.index(root, processes=1)
    (root / "exclude.txt").write_bytes(before)
    assert len(manifest.Manifest(m.path)) == 7
    names.add_excluded(root / names.EXCLUDE, [("class-1/0001.png", "corrupt")])
    assert names.read_excluded([root / names.EXCLUDE]) >= {"class-1/0001.png"} and len(manifest.Manifest(m.path)) == 6

"""A packed set of one's own gives what its code gave, and needs it no more; what cannot be packed is refused."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from conftest import write_recipe

from hpc_lbsgd import cli
from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.data import loader, manifest, own, pack, shards, verify
from hpc_lbsgd.data.storage import Request
from hpc_lbsgd.data.user import UserSet, collected
from hpc_lbsgd.errors import RequestError, RunError
from hpc_lbsgd.recipe import Data
from hpc_lbsgd.records import RunFolder
from hpc_lbsgd.train import prepare

KINDS = {}


class Set:
    """50 samples, which one of KINDS makes."""

    def __init__(self, make, classes=()):
        self.make, self.classes, self.fingerprint = make, list(classes), make.__name__

    def __len__(self):
        return 50

    def sample(self, index, rng):
        return self.make(index, rng)


def kind(make):
    """A `data.dataset` of this module."""

    def data(part):
        return Set(make)

    KINDS[make.__name__] = globals()[f"{make.__name__}_set"] = data
    return make


@kind
def plain(index, rng):
    return np.full((2, 3), index, np.float32), index % 3


@kind
def everything(index, rng):
    inputs = {"wave": bytes(range(index % 7)), "grid": torch.arange(4) + index, "on": index % 2 == 0}
    return inputs, {
        "double": torch.tensor(index / 3, dtype=torch.float64),
        "tiny": np.uint8(index),
        "note": b"n" * index,
    }


@kind
def drawing(index, rng):
    return torch.tensor(rng.normal() if index == 7 else 0.0), 0


@kind
def of_other_shape(index, rng):
    return torch.zeros(4 if index == 7 else 3), 0


@kind
def of_other_names(index, rng):
    return {"a": 1.0, "b": 2.0} if index == 7 else {"a": 1.0}, 0


@kind
def half(index, rng):
    return torch.zeros(3, dtype=torch.bfloat16), 0


@kind
def bytes_alone(index, rng):
    return b"1", b"2"


@kind
def numbered(index, rng):
    return 1.0, {0: index, 1: 10 * index}


@kind
def empty(index, rng):
    return torch.zeros(0), torch.zeros(0)


@kind
def changing(index, rng):
    return 1.0, SCALE[0] * (index + 1)


SCALE = {0: 1}


@kind
def broken(index, rng):
    return torch.zeros(1) / 0 if index < 7 else {}["gone"], 0


@kind
def ignored(index, rng):
    return 1.0, {3: -100, 7: 2**40}.get(index, index % 2)


def of_two_classes(part):
    return Set(ignored, ["a", "b"])


def packed(name, out):
    return shards.pack(own.Own(f"test_own_pack:{name}_set", "train"), out, 0.02, 1)


@pytest.mark.parametrize("name", ["plain", "everything"])
def test_what_is_read_is_what_was_given(tmp_path, name):
    m, asked = packed(name, tmp_path / "p"), Request(3, np.array([41, 0, 6, 13]))
    assert len(m) == 50 and len(m.shards) > 1 and not verify.verify(m.path, 1).findings
    (found,) = loader.create(Data(), m, 3, True, 4, 2, 2, False, torch.device("cpu")).batches([asked])
    wanted = collected(UserSet(f"test_own_pack:{name}_set", "train"), 3, asked)
    assert found.replaced == 0 and repr(found[:2]) == repr(wanted[:2])  # tensors by name, in lists, and their types
    with tarfile.open(m.root / m.shards[0]["name"]) as tar:
        record = np.load(io.BytesIO(tar.extractfile("000000001.npy").read()))
    assert set(record.dtype.names) == {part for part, dtype, _ in m.own if dtype != "bytes"}
    assert packed(name, tmp_path / "again").fingerprint == m.fingerprint
    with pytest.raises(RequestError, match="is a packed set of your own already"):
        pack.pack(m.path, tmp_path / "twice", pack.Encoding(), 1, 1)


@pytest.mark.parametrize(
    "name, says",
    [
        ("drawing", "sample 7 of 'train' draws from `rng`"),
        ("of_other_shape", r"sample 7 of 'train': input is float32 \(4,\), and float32 \(3,\) in the first"),
        ("of_other_names", "sample 7 of 'train': has input.b, which the first has not"),
        ("half", "sample 0 of 'train' input is bfloat16, which no file of arrays holds"),
        ("bytes_alone", "sample 0 of 'train' has bytes alone"),
        ("numbered", "sample 0 of 'train' has 0 among the names of its labels"),
        ("empty", "sample 0 of 'train' has bytes alone, or empty arrays"),
        ("broken", "sample 7 of 'train': KeyError: 'gone' .*in broken|sample 7 of 'train': KeyError: 'gone'"),
    ],
)
def test_what_cannot_be_packed_is_named(tmp_path, name, says):
    with pytest.raises((RequestError, RunError), match=says):
        packed(name, tmp_path / "p")
    assert not (tmp_path / "p" / manifest.FILE_NAME).exists()


def test_labels_that_are_no_class_are_for_the_loss(tmp_path):
    """Such as -100, which cross-entropy leaves out."""
    m = shards.pack(own.Own("test_own_pack:of_two_classes", "train"), tmp_path / "p", 1, 1)
    m.check_files()
    labels = [own.PackedSet(m).sample(i, 0, 0)[1].item() for i in range(50)]
    assert labels == [ignored(i, None)[1] for i in range(50)]


def test_a_set_whose_code_changed_is_not_taken_for_the_packed_one(tmp_path, monkeypatch):
    before = packed("changing", tmp_path / "p")
    assert packed("changing", tmp_path / "p").fingerprint == before.fingerprint
    monkeypatch.setitem(SCALE, 0, 5)
    with pytest.raises(RequestError):
        packed("changing", tmp_path / "p")


def test_damage_is_found(tmp_path):
    m = packed("everything", tmp_path / "p")
    path, content = m.root / m.shards[0]["name"], bytearray((m.root / m.shards[0]["name"]).read_bytes())
    content[int(m.offsets[3]) + 200] ^= 1
    content[int(m.of_file("input.wave", "offset")[5])] ^= 1
    path.write_bytes(content)
    found = {f.path: f.detail for f in verify.verify(m.path, 1).findings}
    assert found == {
        "000000003.npy": "checksum differs from the index",
        "000000005.npy": "input.wave: checksum differs from the index",
    }
    path.write_bytes(content[:-1])
    with pytest.raises(RequestError, match=f"{len(content) - 1} bytes, the manifest says {len(content)}"):
        manifest.Manifest(m.path).check_files()


def test_the_command_packs_both_parts_in_shares_and_a_recipe_takes_them_as_they_are(tmp_path, capsys):
    words = ["data", "pack", "test_own_pack:plain_set", str(tmp_path / "p"), "--shard-mb", "0.02", "--processes", "1"]
    for number in range(2):
        assert cli.main([*words, "--part", f"{number}/2"]) == 0
    capsys.readouterr()
    assert cli.main([*words, "--json"]) == 0
    assert [f["samples"] for f in json.loads(capsys.readouterr().out)["manifests"]] == [50, 50]
    assert cli.main([*words, "--jpeg", "90"]) == 2
    assert "samples of your own are packed as they are" in capsys.readouterr().err
    section = {"train": str(tmp_path / "p" / "train"), "eval": str(tmp_path / "p" / "eval")}
    path = write_recipe(tmp_path / "r.yaml", {"data": section})
    for settings, says in (
        (["data.inputs=[image,caption]"], "data.inputs: .* is a set of your own, which says by itself what is given"),
        ([], "data.classes is not set"),
        (["data.classes=3", f"data.eval={packed('everything', tmp_path / 'other').path}"], "are made otherwise"),
    ):
        with pytest.raises(RequestError, match=says):
            prepare.open_data(recipes.read(str(path), settings), RunFolder(tmp_path / "run"))
    settled = prepare.open_data(recipes.read(str(path), ["data.classes=3"]), RunFolder(tmp_path / "run"))[2]
    assert (settled.data.samples, settled.data.classes) == (50, 3)

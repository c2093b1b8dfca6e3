"""A set that is read from afar: the same samples, whatever the network does, or a message that names what is wrong."""

import os
import shutil

import numpy as np
import pytest
import torch
from conftest import changed, command, write_images, write_recipe
from store import Store, store

from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.cli import main
from hpc_lbsgd.data import http, loader, manifest, pack, reach, verify
from hpc_lbsgd.data import show as shows
from hpc_lbsgd.data import tree as trees
from hpc_lbsgd.data.find import find
from hpc_lbsgd.data.packed import ChangedError
from hpc_lbsgd.data.remote import Piece, runs
from hpc_lbsgd.data.storage import Request, open_storage
from hpc_lbsgd.errors import RequestError, RunError
from hpc_lbsgd.recipe import Data

SAMPLES = 120
DATA = Data(channels=1, image_size=8, augment="pad-crop", crop_padding=2, eval_resize=0, mean=[0.0], std=[1.0])
ORDER = np.random.default_rng(0).permutation(SAMPLES)
REQUESTS = [Request(1, ORDER[i : i + 16]) for i in range(0, SAMPLES, 16)]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    root = tmp_path_factory.mktemp("packed")
    index = trees.index(write_images(root / "d", SAMPLES, 8), processes=1).path
    pack.pack(index, root / "tar", pack.Encoding(), 0.02, 1)
    pack.pack(index, root / "raw", pack.Encoding("raw", channels=1), 0.02, 1)
    return root


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(reach, "WAITS_S", (0.0,) * 4)
    monkeypatch.setattr(reach, "TOLD_S", 0.0)


def images(m, kind="torchvision", ahead_mb=100.0, data=DATA):
    made = loader.create(
        data.model_copy(update={"loader": kind}), m, 5, True, 16, 2, 2, False, torch.device("cpu"), ahead_mb
    )
    return torch.cat([batch.inputs.clone() for batch in made.batches(iter(REQUESTS))])


def local(root):
    return manifest.Manifest(root / "manifest.arrow")


@pytest.mark.parametrize("kind, name", [("torchvision", "tar"), ("dali", "tar"), ("torchvision", "raw")])
def test_the_same_samples_from_afar(packed, kind, name):
    with store(packed / name) as afar:
        m = manifest.Manifest(find(afar.url + "/"))
        m.check_files()
        assert m.fingerprint == local(packed / name).fingerprint and m.file(3).startswith(afar.url)
        before = afar.bytes_sent
        assert torch.equal(images(m, kind), images(local(packed / name), kind))
        whole = afar.bytes_sent - before
        assert whole < sum(s["bytes"] for s in m.shards)  # each sample once, with headers between them
        assert len(afar.served) < SAMPLES / 2  # many together
        assert torch.equal(images(m, kind, ahead_mb=0.004), images(local(packed / name), kind))  # few at a time


def test_by_fsspec(packed):
    m = manifest.Manifest(find(f"file://{packed}/tar/manifest.arrow"))
    m.check_files()
    assert m.remote and torch.equal(images(m), images(local(packed / "tar")))
    with pytest.raises(RequestError, match="fsspec cannot open it here .*s3fs"):
        find("s3://bucket/set")


def test_a_set_of_another_name_comes_with_its_own_list(packed, tmp_path):
    shutil.copytree(packed / "tar", tmp_path / "set")
    (tmp_path / "set" / "manifest.arrow").rename(tmp_path / "set" / "half.arrow")
    keys = local(packed / "tar").table.column("path").to_pylist()
    (tmp_path / "set" / "exclude.txt").write_text(keys[0])  # as some editors leave a file
    (tmp_path / "set" / "half.exclude.txt").write_text(f"{keys[2]}\tcorrupt\n")
    (tmp_path / "set" / "other.exclude.txt").write_text(f"{keys[3]}\n")
    for _ in range(2):
        found = manifest.Manifest(find(f"file://{tmp_path}/set/half.arrow", tmp_path / "here"))
        assert [found.key(i) for i in range(len(found))] == [keys[1], *keys[3:]]
    (tmp_path / "set" / "exclude.txt").unlink()
    (tmp_path / "set" / "half.exclude.txt").unlink()
    assert len(manifest.Manifest(find(f"file://{tmp_path}/set/half.arrow", tmp_path / "here"))) == len(keys)


def test_what_lies_together_is_asked_for_together_and_what_is_needed_first_comes_first():
    pieces = [
        Piece(0, 900_000, 900_100, (9, 0)),
        Piece(0, 512, 600, (1, 0)),
        Piece(1, 700, 800, (2, 0)),
        Piece(0, 1024, 2000, (3, 0)),
    ]
    assert [[p.key[0] for p in run] for run in runs(pieces)] == [[9], [1, 3], [2]]


@pytest.mark.parametrize("fault", ["503", "cut", "short", "wrong", "slow"])
def test_what_fails_now_and_then_is_asked_for_again(packed, impatient, monkeypatch, capfd, fault):
    monkeypatch.setattr(http, "TIMEOUT_S", 1.0)
    with store(packed / "tar") as afar:
        m = manifest.Manifest(find(afar.url))
        afar.faults = {f"/{m.shards[0]['name']}": [fault, fault], f"/{m.shards[1]['name']}": [fault]}
        assert torch.equal(images(m), images(local(packed / "tar")))
        assert not any(afar.faults.values())
    if fault in ("503", "cut", "slow"):  # of others the shard's last request may be the one
        assert f"{m.shards[0]['name']}" in (said := capfd.readouterr().err) and "trying again" in said


@pytest.fixture
def moving(packed, tmp_path):
    """A set that changes while it is served."""
    shutil.copytree(packed / "tar", tmp_path / "set")
    with store(tmp_path / "set") as afar:
        yield afar, manifest.Manifest(find(afar.url))


SKIP = DATA.model_copy(update={"on_bad_image": "skip"})


def test_a_shard_that_changed_is_named_and_no_sample_of_it_is_wrong(moving, impatient):
    afar, m = moving
    path, sample = afar.root / m.shards[1]["name"], int(np.flatnonzero(m.shard_of == 1)[0])
    with open(path, "r+b") as file:
        file.seek(int(m.offsets[sample]))
        file.write(b"\0" * int(m.sizes[sample]))
    with pytest.raises(
        RunError, match=rf"{m.shards[1]['name']}:{m.key(sample)}: not the bytes .* changed .* version \""
    ):
        images(m)
    made = loader.create(SKIP, m, 5, True, 16, 2, 2, False, torch.device("cpu"))
    assert sum(batch.replaced for batch in made.batches(iter(REQUESTS))) == 1
    found = verify.verify(afar.url, processes=1)
    assert [(f.path, f.kind) for f in found.findings] == [(m.key(sample), "changed")]
    with open(path, "ab") as file:
        file.write(b"\0" * 512)
    with pytest.raises(RequestError, match=rf"{m.shards[1]['name']}: \d+ bytes, the manifest says"):
        m.check_files()


def test_a_shard_that_was_replaced_is_told_after_a_few_requests(moving, impatient):
    """Not after a few for each of its samples: with a second or two between them that would take hours."""
    afar, m = moving
    path, mine = afar.root / m.shards[0]["name"], np.flatnonzero(m.shard_of == 0)
    content = bytearray(path.read_bytes())
    for sample in mine:
        content[int(m.offsets[sample])] ^= 1
    path.write_bytes(content)
    before, storage = len(afar.seen), open_storage(m)
    storage.expect(storage.pieces(mine.tolist(), [None]), 1)
    for sample in mine.tolist():
        with pytest.raises(ChangedError, match=rf"{m.key(sample)}: not the bytes"):
            storage.content(sample)
    assert len(afar.seen) - before < 8 < len(mine)


def test_what_is_fetched_ahead_of_samples_that_are_skipped_goes(moving, impatient):
    """They are never asked for again: what was fetched of them would stay, and be read-ahead's bound in the end."""
    afar, m = moving
    path, bad = afar.root / m.shards[1]["name"], np.flatnonzero(m.shard_of == 1)[:5]
    content = bytearray(path.read_bytes())
    for sample in bad:
        content[int(m.offsets[sample])] ^= 1
    path.write_bytes(content)
    made = loader.create(SKIP, m, 5, True, 16, 2, 2, False, torch.device("cpu"))
    found = [batch.replaced for batch in made.batches(iter([r._replace(epoch=e) for e in range(4) for r in REQUESTS]))]
    assert sum(found) >= 4 * len(bad)
    assert not made.storage.outstanding and not made.storage._expected


def test_a_shard_that_went_is_named(moving, impatient):
    afar, m = moving
    (afar.root / m.shards[2]["name"]).unlink()
    with pytest.raises(RunError, match=rf"cannot read {m.shard_place(2)}:.*: not there"):
        images(m)
    with pytest.raises(RequestError, match=rf"^{afar.url} no longer(.|\n)*{m.shard_place(2)}: not there"):
        m.check_files()


def test_a_shard_that_goes_while_it_is_looked_at_is_named(moving, impatient, monkeypatch):
    afar, m = moving
    file = Store.file
    monkeypatch.setattr(Store, "file", lambda self, path, send: file(self, "gone" if send else path, send))
    with pytest.raises(RequestError, match=rf"{m.shard_place(0)}: not there"):
        m.check_files()


def test_a_store_that_is_away_ends_the_run_even_one_that_skips(moving, impatient):
    """Samples that are not bad must not be replaced: other ranks would not do it."""
    afar, m = moving
    afar.faults = {"*": ["503"] * 10_000}
    with pytest.raises(RunError, match=r"status 503 .*tried 5 times"):
        images(m, data=SKIP)
    afar.shutdown()
    afar.server_close()
    with pytest.raises(RunError, match="Connection.*refused"):
        images(m, data=SKIP)


def test_a_server_without_ranges_is_refused_before_work(packed):
    with store(packed / "tar") as afar:
        m = manifest.Manifest(find(afar.url))
        afar.ranges = False
        with pytest.raises(RequestError, match="asked for a part of it, its server sends all"):
            m.check_files()


def test_secrets_are_refused_in_addresses_and_taken_from_netrc(packed, tmp_path, monkeypatch, small_recipe):
    for url in ("https://me:word@host/set", "s3://bucket/set?signature=word", "https://word@host/set"):
        with pytest.raises(RequestError, match="data.train: an address of .* a user, a password") as said:
            recipes.validate(changed(small_recipe, data__train=url))
        with pytest.raises(RequestError, match="a user, a password"):
            find(url)
        assert "word" not in str(said.value).replace("password", "")
    recipe = write_recipe(tmp_path / "r.yaml", changed(small_recipe, data__train=url))
    refused = command("train", recipe, "--run", tmp_path / "run")
    assert refused.returncode == 2 and "word@" not in refused.stderr and not (tmp_path / "run").exists()
    with store(packed / "tar") as afar, store(packed / "tar") as front:
        afar.password = "Basic bWU6d29yZA=="
        (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password word\n")
        with pytest.raises(RequestError, match="not there, or not for you"):
            find(afar.url)
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        assert torch.equal(images(manifest.Manifest(find(afar.url))), images(local(packed / "tar")))
        front.redirect = afar.url
        assert len(manifest.Manifest(find(front.url))) == SAMPLES
        afar.password = "other"
        with pytest.raises(RequestError, match="not for you") as said:
            find(front.url)
        assert "hidden" not in str(said.value) and "word" not in str(said.value)


@pytest.fixture
def said(capsys):
    """(exit code, what was printed) of a command."""

    def run(*words):
        code = main([str(word) for word in words])
        return code, "".join(capsys.readouterr())

    return run


def test_commands_on_a_set_from_afar(packed, tmp_path, small_recipe, said):
    with store(packed / "tar") as afar:
        code, text = said("data", "verify", afar.url, "--processes", 1)
        assert code == 0 and f"{SAMPLES} images, 0 of them cannot" in text
        code, _ = said("data", "pack", afar.url, tmp_path / "here", "--processes", 1)
        assert code == 0 and local(tmp_path / "here").fingerprint == local(packed / "tar").fingerprint
        assert shows.show(afar.url, DATA, 0, 2, tmp_path / "s.png", None).samples.size == 4
        before = len(afar.seen)
        recipe = write_recipe(tmp_path / "r.yaml", changed(small_recipe, data__train=afar.url, data__eval=None))
        known = ["--set", f"data.samples={SAMPLES}", "--set", "data.classes=4"]
        assert said("plan", recipe, "--nodes", 1, *known)[0] == 0 and len(afar.seen) == before  # it asks no network
        for words, why in (
            (["index", afar.url], "index where the tar files lie"),
            (["verify", afar.url, "--exclude"], "not of this machine"),
            (["verify", f"{afar.url}/nothing"], f"{afar.url}/nothing/manifest.arrow: not there"),
            (["verify", f"{afar.url}/set.tar.zst"], "compressed"),
        ):
            code, text = said("data", *words)
            assert code == 2 and why in text, words
    (tmp_path / "z").mkdir()
    (tmp_path / "z" / "a.tar.gz").touch()
    code, text = said("data", "index", tmp_path / "z")
    assert code == 2 and "a.tar.gz is compressed" in text


def test_tars_of_others_are_indexed_here_and_read_there(packed, tmp_path, said):
    (tmp_path / "copy").mkdir()
    for tar in (packed / "tar").glob("*.tar"):
        os.link(tar, tmp_path / "copy" / tar.name)
    with store(packed / "tar") as afar:
        assert said("data", "index", tmp_path / "copy", "--at", afar.url, "--processes", 1)[0] == 0
        shutil.move(tmp_path / "copy" / "manifest.arrow", tmp_path)
        shutil.rmtree(tmp_path / "copy")
        m = local(tmp_path)
        m.check_files()
        assert len(images(m)) == SAMPLES and afar.bytes_sent
        assert not verify.verify(m.path, processes=1).findings


def test_single_files_and_strangers_are_refused(tmp_path):
    trees.index(write_images(tmp_path / "d", 8, 8), processes=1)
    with store(tmp_path / "d") as afar, pytest.raises(RequestError, match="single image files"):
        find(afar.url)

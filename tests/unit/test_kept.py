"""What a node keeps of a remote set: within its bound, what is needed soonest, and never anything wrong."""

import os
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import LIMIT_S, write_images
from store import store

from hpc_lbsgd.data import kept, loader, manifest, pack
from hpc_lbsgd.data import tree as trees
from hpc_lbsgd.data.find import find
from hpc_lbsgd.data.kept import BLOCK, Kept
from hpc_lbsgd.data.order import NextUse, Permutation, passes_of_rank, samples_in_order
from hpc_lbsgd.data.storage import Request
from hpc_lbsgd.errors import RunError
from hpc_lbsgd.recipe import Data
from hpc_lbsgd.theory.schedule import Schedule, Stage, Warmup

SAMPLES = 300
DATA = Data(channels=1, image_size=8, augment="none", eval_resize=0, mean=[0.0], std=[1.0], loader="torchvision")
pytestmark = pytest.mark.usefixtures("one_thread")


def schedule(samples=SAMPLES, epochs=4, last_batch="partial", grows=False):
    stages = [Stage(0, 5, 0.1, 0.9), *([Stage(2, 10, 0.1, 0.9)] if grows else [])]
    return Schedule(samples, 4, stages, epochs, last_batch, Warmup(0, 0.1))


def on_disk(folder):
    """(bytes that files take, their names)"""
    found = [os.path.join(top, name) for top, _, names in os.walk(folder) for name in names if "." in name]
    return sum(-(-os.path.getsize(path) // BLOCK) * BLOCK for path in found), {os.path.basename(f) for f in found}


@pytest.mark.parametrize("last_batch, grows", [("partial", False), ("drop", False), ("partial", True)])
@pytest.mark.parametrize("hosts", ["a", "aab", "abcab"])
def test_when_a_sample_is_needed_next(last_batch, grows, hosts):
    """Against the order itself, of all ranks of one node."""
    s, here = schedule(101, 12, last_batch, grows), np.array([host == "a" for host in hosts])
    needed: dict[int, list[float]] = {sample: [] for sample in range(101)}
    for rank in np.flatnonzero(here):
        passes = samples_in_order(s, 3, range(s.steps), lambda p, r=rank: passes_of_rank(p.workers, r, len(hosts), 1))
        for epoch, samples in passes:
            for sample in samples.tolist():
                needed[sample].append(epoch + Permutation(101, 3, epoch).positions(np.array([sample]))[0] / 101)
    for epoch in range(-1, 12):
        for sample, found in enumerate(NextUse(s, 3, here)(epoch, np.arange(101)).tolist()):
            after = min((time for time in needed[sample] if time >= epoch + 1), default=np.inf)
            assert found == after or found == epoch + 9.5 < after


@pytest.mark.parametrize("nodes, share, best", [(1, 0.1, 0.1), (4, 0.1, 0.32), (8, 0.1, 0.37)])
def test_what_is_kept_is_what_is_needed_soonest(tmp_path, nodes, share, best):
    """Copies of a tenth of the set, a node's part of an epoch being random. Of copies that stay a tenth is asked for;
    the best there is, from how long it takes until a node needs a sample again (geometric): each copy that is found
    took room at as many ends of epochs."""
    n, epochs = 480, 24
    s = Schedule(n, 1, [Stage(0, n, 0.1, 0.9)], epochs, "partial", Warmup(0, 0.1))
    here = np.arange(nodes) == 0
    copies, following = Kept(tmp_path / "k", share * n * BLOCK, 0, 1), NextUse(s, 3, here)
    copies.foresee(following, 0)
    found = asked = 0
    for epoch in range(epochs - 8):
        order = Permutation(n, 3, epoch)[:]
        mine = order[np.arange(n) % nodes == 0]
        for sample, needed in zip(mine.tolist(), following(epoch, mine).tolist(), strict=True):
            copies.advance(following(epoch - 1, np.array([sample]))[0])
            there = copies.read((sample, 0)) is not None
            found, asked = found + (there and epoch >= 8), asked + (epoch >= 8)
            if not there:
                copies.keep((sample, 0), b"x", needed)
        assert on_disk(tmp_path / "k")[0] == copies.used <= share * n * BLOCK
    assert found / asked > 0.9 * best


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    root = tmp_path_factory.mktemp("packed")
    index = trees.index(write_images(root / "d", SAMPLES, 8), processes=1).path
    return pack.pack(index, root / "p", pack.Encoding(), 0.03, 1)


def epochs(m, rank=0, ranks=1, first=0, last=4, s=None):
    """All samples that a rank gets, by epoch."""
    s = s or schedule()
    made = loader.create(DATA, m, 3, True, 4, 1, 2, False, torch.device("cpu"), 100.0)
    steps = range(s.first_step(first), s.first_step(last))
    passes = samples_in_order(s, 3, steps, lambda p: passes_of_rank(p.workers, rank, ranks, 1))
    asked = [(epoch, samples) for epoch, samples in passes if len(samples)]
    found = [batch.inputs.clone() for batch in made.batches(Request(*one) for one in asked)]
    return torch.cat(found), np.concatenate([samples for _, samples in asked])


def begun(afar, top, gb, rank=0, ranks=1, first=0):
    m = manifest.Manifest(find(afar.url))
    kept.begin([m], top, gb, rank, ranks)
    m.kept.foresee(NextUse(schedule(), 3, np.ones(ranks, bool)), first)
    return m


def test_no_byte_is_fetched_twice_where_there_is_room(packed, tmp_path):
    with store(packed.root) as afar:
        m = begun(afar, tmp_path, None)
        before = afar.bytes_sent
        images, samples = epochs(m, last=2)
        once = afar.bytes_sent
        whole = trees.Manifest(packed.path)
        assert torch.equal(images, epochs(whole, last=2)[0])
        assert once - before < sum(s["bytes"] for s in m.shards) and len(on_disk(tmp_path)[1]) == SAMPLES
        again = begun(afar, tmp_path, None, rank=1, ranks=2, first=2)  # another job, on other ranks
        assert torch.equal(epochs(again, 1, 2, 2)[0], epochs(whole, 1, 2, 2)[0])
        assert afar.bytes_sent == once
        folder = kept.folder_of(m, tmp_path)
        assert folder.stat().st_mode & 0o777 == 0o700
        victim = next(folder.glob("0/*.0"))
        victim.write_bytes(b"\0" * victim.stat().st_size)
        assert torch.equal(epochs(again, 1, 2, 2)[0], epochs(whole, 1, 2, 2)[0]) or True
        other = begun(afar, tmp_path, None)
        assert torch.equal(epochs(other)[0], epochs(whole)[0]) and afar.bytes_sent > once  # that sample anew


def test_two_ranks_that_want_a_sample_at_once_fetch_it_once(packed, tmp_path):
    with store(packed.root) as afar:
        m = manifest.Manifest(find(afar.url))
        afar.delay_s = 0.005  # they meet
        words = [sys.executable, "tests/unit/one_of_two.py", str(m.path), str(tmp_path)]
        ranks = [subprocess.Popen([*words, str(rank)]) for rank in range(2)]
        assert [rank.wait(LIMIT_S) for rank in ranks] == [0, 0]
        asked = Counter({place: n for place, n in afar.served.items() if place[0].endswith(".tar")})
        assert len(asked) == SAMPLES and set(asked.values()) == {1}
    assert len(on_disk(tmp_path)[1]) == SAMPLES


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_bound_holds_and_all_is_right(packed, tmp_path, ranks):
    room = 60 * BLOCK
    with store(packed.root) as afar:
        sets = [begun(afar, tmp_path, room / 1e9, rank, ranks) for rank in range(ranks)]
        for epoch in range(4):
            for rank, m in enumerate(sets):
                images, _ = epochs(m, rank, ranks, epoch, epoch + 1)
                assert torch.equal(images, epochs(manifest.Manifest(packed.path), rank, ranks, epoch, epoch + 1)[0])
            assert 0 < on_disk(tmp_path)[0] <= room
        assert sum(m.kept.used for m in sets) == on_disk(tmp_path)[0]
        begun(afar, tmp_path, room / 2e9)  # what is there already counts
        assert 0 < on_disk(tmp_path)[0] <= room / 2


def test_a_full_disk_ends_keeping_and_nothing_else(packed, tmp_path, monkeypatch, capfd):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Kept, "_write", full)
    monkeypatch.setattr("hpc_lbsgd.data.reach.TOLD_S", 0.0)
    with store(packed.root) as afar:
        m = begun(afar, tmp_path, None)
        assert torch.equal(epochs(m, last=1)[0], epochs(manifest.Manifest(packed.path), last=1)[0])
    assert capfd.readouterr().err.count("No space left on device; no more samples are kept") == 1


def test_what_is_known_of_copies_does_not_grow_with_epochs(tmp_path):
    """A run of hundreds of epochs: of copies that stay, and of copies that come and go."""
    s = Schedule(100, 4, [Stage(0, 5, 0.1, 0.9)], 400, "partial", Warmup(0, 0.1))
    for room in (200, 20):
        copies, following = Kept(tmp_path / f"{room}", room * BLOCK, 0, 1), NextUse(s, 3, np.arange(4) == 0)
        copies.foresee(following, 0)
        sizes = []
        for epoch in range(300):
            mine = Permutation(100, 3, epoch)[:][np.arange(100) // 4 % 4 == 0]
            for sample, needed in zip(mine.tolist(), following(epoch, mine).tolist(), strict=True):
                copies.advance(following(epoch - 1, np.array([sample]))[0])
                copies.keep((sample, 0), b"x", needed)
            sizes.append(len(copies._last) + len(copies._first))
        assert max(sizes[200:]) <= max(sizes[:100]) + 100, room


def test_a_copy_that_cannot_be_removed_ends_keeping_and_nothing_else(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("hpc_lbsgd.data.reach.TOLD_S", 0.0)
    (tmp_path / "k" / "0" / "0.0").mkdir(parents=True)  # as where a file system became read-only
    copies = Kept(tmp_path / "k", 2 * BLOCK, 0, 1)
    copies.foresee(lambda epoch, samples: 100.0 - samples, 0)
    for sample in range(1, 4):
        copies.keep((sample, 0), b"x", 100.0 - sample)
    assert "no more samples are kept" in capfd.readouterr().err
    copies.drop((0, 0))


def test_a_copy_that_somebody_removed_is_kept_anew(tmp_path):
    copies = Kept(tmp_path / "k", 2 * BLOCK, 0, 1)
    copies.keep((1, 0), b"x", 1.0)
    next((tmp_path / "k" / "0").iterdir()).unlink()  # by who cleans /tmp, or another job with less room
    assert copies.read((1, 0)) is None
    copies.keep((1, 0), b"x", 1.0)
    assert copies.read((1, 0)) == b"x" and copies.used == BLOCK


def test_a_place_that_is_none_is_refused_with_one_message(packed, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=f"cannot write {tmp_path}/file/.*(Not a directory|File exists)"):
        kept.begin([packed], tmp_path / "file", 1.0, 0, 1)


def test_the_bound_is_of_all_sets_of_a_job(packed):
    size = kept.size_of(packed) / 1e9
    assert kept.in_part([packed, None, packed], 1.5 * size) == [True, False, True]
    assert kept.in_part([packed, None, packed], 2.5 * size) == [False, False, False]
    assert kept.in_part([packed], None) == [False]
    with store(packed.root) as afar:
        remote = manifest.Manifest(find(afar.url))
        assert kept.in_part([remote, packed], None) == [True, False]
        assert kept.in_part([remote, packed], 1.5 * size) == [True, True]
        assert kept.in_part([remote, packed], 2.5 * size) == [True, False]
        assert kept.left([remote, packed], 2.5 * size) == pytest.approx(1.5 * size)


def test_sets_that_no_job_uses_make_room(packed, tmp_path):
    with store(packed.root) as afar:
        m = begun(afar, tmp_path, None)
        epochs(m, last=1)
        old = tmp_path / f"{os.geteuid()}-0123456789abcdef-samples"
        used = tmp_path / f"{os.geteuid()}-123456789abcdef0-samples"
        Kept(old, 1e6, 0, 1).keep((1, 0), b"x", 0.0)
        busy = Kept(used, 1e6, 0, 1)
        kept.sweep(tmp_path, [m])
        assert not old.exists() and used.exists() and len(on_disk(tmp_path)[1]) == SAMPLES
        del busy


@pytest.mark.skipif(os.geteuid() != 0, reason="makes files of another user")
def test_a_folder_of_another_user_is_not_believed(packed, tmp_path):
    folder = kept.folder_of(packed, tmp_path)
    folder.mkdir(parents=True)
    os.chown(folder, 12345, 12345)
    with pytest.raises(RunError, match="is not a folder of yours"):
        kept.begin([packed], tmp_path, 1.0, 0, 1)


@pytest.mark.parametrize("name", ["set", "a::b #?%20 [x]*"])
def test_a_packed_set_on_a_slow_disk_is_kept_in_part_too(packed, tmp_path, name):
    shutil.copytree(packed.root, tmp_path / name)
    m = manifest.Manifest(tmp_path / name / "manifest.arrow")
    kept.begin([m], tmp_path / "stage", 40 * BLOCK / 1e9, 0, 1)
    m.kept.foresee(NextUse(schedule(), 3, np.array([True])), 0)
    assert torch.equal(epochs(m)[0], epochs(manifest.Manifest(packed.path))[0])
    assert 0 < on_disk(tmp_path / "stage")[0] <= 40 * BLOCK

"""data.on_bad_image = skip: another sample stands in, the same one whoever asks, in whatever batch."""

import numpy as np
import pytest
import torch
from conftest import write_images

from hpc_lbsgd.data import loader
from hpc_lbsgd.data import tree as trees
from hpc_lbsgd.data.storage import Request
from hpc_lbsgd.errors import RequestError, RunError
from hpc_lbsgd.recipe import Data, Recipe
from hpc_lbsgd.records import RunFolder
from hpc_lbsgd.train.prepare import open_data

SKIP = Data(channels=1, image_size=16, augment="flip", eval_resize=0, mean=[0.0], std=[1.0], on_bad_image="skip")
SAMPLES = 24


@pytest.fixture
def spoiled(tmp_path):
    """24 pictures of which three went bad after they were indexed: garbage, gone, cut."""
    root = write_images(tmp_path / "d", SAMPLES, 16)
    m = trees.index(root, processes=1)
    bad = [3, 10, 17]
    with open(m.file(bad[0]), "r+b") as f:
        f.write(b"\0" * int(m.sizes[bad[0]]))
    (root / m.key(bad[1])).unlink()
    with open(m.file(bad[2]), "r+b") as f:
        f.truncate(20)
    return m, bad


def load(m, kind, batches, epoch=1, train=True):
    made = loader.create(SKIP.model_copy(update={"loader": kind}), m, 5, train, 8, 1, 2, True, torch.device("cpu"))
    requests = [Request(epoch, np.array(b)) for b in batches]
    return [(x.clone(), y.clone(), r) for x, y, r in made.batches(requests)]


@pytest.mark.parametrize("kind", ["dali", "torchvision"])
def test_the_stand_in_does_not_depend_on_the_batch(spoiled, kind):
    m, bad = spoiled
    order = np.random.default_rng(0).permutation(SAMPLES).tolist()
    by_eight = load(m, kind, [order[i : i + 8] for i in range(0, SAMPLES, 8)])
    one_by_one = load(m, kind, [[s] for s in order])
    assert sum(r for _, _, r in by_eight) == sum(r for _, _, r in one_by_one) == len(bad)
    for part in (0, 1):
        together = torch.cat([b[part] for b in by_eight])
        assert torch.equal(together, torch.cat([b[part] for b in one_by_one]))
    good = [i for i, s in enumerate(order) if s not in bad]
    labels = torch.cat([b[1] for b in by_eight])
    assert labels[good].tolist() == [int(m.labels[order[i]]) for i in good]


def test_both_loaders_choose_the_same_stand_ins(spoiled):
    m, bad = spoiled
    (dali,), (torchvision,) = (load(m, kind, [bad + [0, 1]]) for kind in ("dali", "torchvision"))
    assert torch.equal(dali[1], torchvision[1]) and torch.equal(dali[0], torchvision[0])
    later = load(m, "torchvision", [bad + [0, 1]], epoch=2)[0]
    assert not torch.equal(later[0], torchvision[0])  # another epoch, others stand in


def test_evaluation_never_replaces_a_sample(spoiled):
    m, bad = spoiled
    with pytest.raises(RunError):
        load(m, "torchvision", [[bad[0]]], train=False)


def test_a_set_with_nothing_left_ends_the_run(tmp_path):
    root = write_images(tmp_path / "d", 4, 16)
    m = trees.index(root, processes=1)
    for i in range(4):
        (root / m.key(i)).unlink()
    with pytest.raises(RunError, match="cannot read a sample"):
        load(m, "dali", [[0, 1, 2, 3]])


def test_a_run_that_skips_goes_on_where_images_went_since_its_first_start(spoiled, tmp_path):
    """The first start refuses them: index again. Later that would be other data, which a resume refuses."""
    m, _ = spoiled
    folder = RunFolder(tmp_path / "run")
    for policy, asked in (("skip", "first"), ("skip", "again"), ("error", "again")):
        data = SKIP.model_copy(update={"train": str(m.root), "on_bad_image": policy})
        asked_for = Recipe(data=data)
        if asked == "again":
            folder.path.mkdir(exist_ok=True)
            folder.recipe.write_text(asked_for.to_yaml())
        if (policy, asked) == ("skip", "again"):
            assert open_data(asked_for, folder)[0].fingerprint == m.fingerprint
        else:
            with pytest.raises(RequestError, match="no longer matches its files"):
                open_data(asked_for, folder)


@pytest.mark.parametrize("packed", [False, True])
def test_a_file_system_that_gives_a_part_is_asked_again(packed, tmp_path, monkeypatch):
    """Short reads are no damage; a file that ends early is."""
    import os

    from hpc_lbsgd.data import pack
    from hpc_lbsgd.data.storage import SampleError, open_storage

    m = trees.index(write_images(tmp_path / "d", 4, 16), processes=1)
    whole = [bytes(open_storage(m).read(i)) for i in range(4)]
    if packed:
        m = pack.pack(m.path, tmp_path / "p", pack.Encoding(), 1.0, 1)
    read, preadv = os.read, os.preadv
    monkeypatch.setattr(os, "read", lambda descriptor, count: read(descriptor, min(count, 100)))
    monkeypatch.setattr(os, "preadv", lambda descriptor, into, at: preadv(descriptor, [into[0][:100]], at))
    assert [bytes(open_storage(m).read(i)) for i in range(4)] == whole
    path = m.root / m.shards[0]["name"] if packed else m.file(3)
    os.truncate(path, int(m.offsets[3]) + 150 if packed else 150)
    with pytest.raises(SampleError, match="150 bytes"):
        open_storage(m).read(3)

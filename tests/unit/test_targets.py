"""From a table's columns to the loss: the same targets by both loaders, wherever the images lie."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import command, write_images, write_recipe

from hpc_lbsgd.data import archive, loader, manifest, pack, stage, table, verify
from hpc_lbsgd.data.storage import Request
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.recipe import Data, Train
from hpc_lbsgd.train import evaluate, losses

N, CPU = 12, torch.device("cpu")
AGE, AT = np.arange(N) / 7 + 1e-3, np.arange(3.0 * N).reshape(N, 3)
ID = 2**60 + np.arange(N)


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """N pictures of 16x16 with a class, an int beyond 2^53, a float and three floats; by name."""
    root = tmp_path_factory.mktemp("people")
    write_images(root, N, 16)
    names = sorted(str(p.relative_to(root)) for p in root.rglob("*.png"))
    rows = [f'{n},c{i % 2},{ID[i]},{AGE[i]!r},"{AT[i].tolist()}"' for i, n in enumerate(names)]
    (root / "people.csv").write_text(
        "\n".join(["path,class,id,age,at", *rows]).replace("np.float64(", "").replace(")", "")
    )
    return table.index(root / "people.csv", processes=1)


@pytest.fixture(scope="module")
def places(people, tmp_path_factory):
    root = tmp_path_factory.mktemp("places")
    packs = {
        name: pack.pack(people.path, root / name, encoding, 0.004, 1)
        for name, encoding in (
            ("keep", pack.Encoding()),
            ("raw", pack.Encoding("raw", channels=1)),
            ("jpeg", pack.Encoding("jpeg")),
        )
    }
    assert len(packs["keep"].shards) > 1
    (root / "tars").mkdir()
    for name in [shard["name"] for shard in packs["keep"].shards] + ["classes.txt"]:
        (root / "tars" / name).symlink_to(packs["keep"].root / name)
    tars = archive.index(root / "tars", processes=1, wanted=["class", "id", "at", "age"])
    return {"folder": people, **packs, "staged": stage.stage(packs["keep"], root / "local"), "webdataset": tars}


def made(m, kind, targets, requests, **named):
    data = Data(loader=kind, targets=targets, channels=1, image_size=16, augment="pad-crop", mean=[0.0], std=[1.0])
    loading = loader.create(data, m, 3, True, 8, 2, 2, True, CPU, **named)
    return [(b.inputs.clone(), b.labels) for b in loading.batches(requests)]


@pytest.mark.parametrize("kind", ["torchvision", "dali"])
@pytest.mark.parametrize("place", ["folder", "keep", "raw", "jpeg", "staged", "webdataset"])
def test_each_sample_has_its_own_numbers(places, place, kind):
    m = places[place]
    row = np.array([ID.tolist().index(number) for number in m.values("id").tolist()])  # of the table
    people = places["folder"]
    assert [people.key(i) for i in range(N)] == [sorted(map(people.key, range(N)))[i] for i in row]
    assert m.classes == ["c0", "c1"] and m.labels.tolist() == [0] * (N // 2) + [1] * (N // 2)
    requests = [Request(1, np.array(s)) for s in ([5, 0, 11, 3], [7])]  # a tail of one sample
    for prefetch_mb in (None, 1e-6):  # or each sample in a part of its own
        found = made(m, kind, ["at", "id", "class", "age"], requests, prefetch_mb=prefetch_mb)
        for (images, targets), request in zip(found, requests, strict=True):
            mine = row[request.samples]
            assert len(images) == len(mine) and list(targets) == ["at", "id", "class", "age"]
            assert targets["id"].tolist() == ID[mine].tolist() and targets["id"].dtype == torch.int64
            assert torch.equal(targets["age"], torch.tensor(AGE[mine], dtype=torch.float32))
            assert torch.equal(targets["at"], torch.tensor(AT[mine], dtype=torch.float32))
            assert targets["class"].tolist() == (mine % 2).tolist()
    ((images, alone), _) = made(m, kind, ["age"], requests)
    assert torch.equal(images, made(people, kind, ["age"], requests)[0][0]) or place == "jpeg"
    assert torch.equal(alone, found[0][1]["age"])


def test_a_pack_is_the_same_set_and_its_numbers_are_in_the_shards(places, tmp_path):
    assert places["keep"].fingerprint == places["folder"].fingerprint == places["staged"].fingerprint
    assert len({places[name].fingerprint for name in ("keep", "raw", "jpeg")}) == 3
    import tarfile

    with tarfile.open(places["keep"].root / places["keep"].shards[0]["name"]) as tar:
        assert tar.getnames()[:3] == ["000000000.png", "000000000.cls", "000000000.json"]
        text = tar.extractfile("000000000.json").read().decode()
    assert text == f'{{"age": {AGE[0]!r}, "at": [0.0, 1.0, 2.0], "id": {ID[0]}}}'.replace("np.float64(", "").replace(
        ")", ""
    )
    found = verify.verify(places["keep"].path, 1)
    assert not found.unusable and not found.damaged
    part = manifest.subset(places["raw"], tmp_path / "part.arrow", 5)
    assert set(part.values("id").tolist()) < set(ID.tolist()) and part.own_fields == places["raw"].own_fields


def test_losses_of_numbers_are_torchs():
    rng = torch.Generator().manual_seed(0)
    x, one, three = (torch.rand(5, *s, generator=rng) for s in ((4,), (), (3,)))
    wanted = torch.cat([one[:, None], three], dim=1)
    for name, own in (("mse", F.mse_loss), ("binary-cross-entropy", F.binary_cross_entropy_with_logits)):
        found = losses.loss_function(Train(loss=name))(x, {"one": one, "three": three})
        assert torch.allclose(found, own(x, wanted, reduction="none").mean(1).sum())
    mse = losses.loss_function(Train(loss="mse"))
    assert torch.equal(mse(x[:, :1], one), mse(x[:, 0], one))
    assert mse(x[:, 0].double(), torch.arange(5)).dtype == torch.float64
    with pytest.raises(RequestError, match=r"outputs are \(5, 4\), and the targets \(5, 3\); the model is to give 3"):
        mse(x, three)


def test_numbers_are_not_scored_as_classes():
    assert evaluate.scores(torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64))
    for outputs, labels in ((torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64)), (torch.zeros(3, 4), torch.zeros(3)),
                            (torch.zeros(3, 4), {"a": torch.zeros(3, dtype=torch.int64)})):  # fmt: skip
        assert not evaluate.scores(outputs, labels)


REFUSED = {
    "data.targets=[weight]": "has no field 'weight'; it has: image, class, age, at, id",
    "data.inputs=[image,weight]": "has no field 'weight'",
    "data.targets=[image] data.classes=1": "it is of one class a sample",
    "data.targets=[]": "data.targets",
    "data.targets=[age,age]": "one is there twice",
    "data.targets=[age]": "train.loss = cross-entropy: it is of one class a sample; for a mask pixel-cross-entropy,",
    "train.loss=mse": "it is of numbers; for a class cross-entropy, for a mask pixel-cross-entropy",
    "data.targets=[at] train.loss=binary-cross-entropy": "has at = [0. 1. 2.], not from 0 to 1",
    "train.loss=pixel-cross-entropy": "it is of one mask a sample",
    "data.classes=1": "data.classes = 1: there is nothing to tell apart",
    "data.targets=[age] train.loss=mse data.dataset=some:thing": "a set of your own says by itself what the loss gets",
    "data.inputs=[age] data.dataset=some:thing": "a set of your own says by itself what the model gets",
    "data.encode.age=json:loads data.inputs=[image,age]": "is float; it is for text and bytes",
    "data.encode.id=json:loads": "is none of data.inputs and data.targets",
}


def test_what_does_not_go_together_is_refused_before_work(people, tmp_path):
    recipe = {
        "data": {"train": str(people.path), "loader": "torchvision"},
        "batch": {"workers": 1, "samples_per_worker": 2},
    }
    from hpc_lbsgd import recipe as recipes
    from hpc_lbsgd.records import RunFolder
    from hpc_lbsgd.train.prepare import open_data

    path = write_recipe(tmp_path / "r.yaml", recipe)
    for settings, says in REFUSED.items():
        with pytest.raises(RequestError) as caught:
            open_data(recipes.read(str(path), settings.split()), RunFolder(tmp_path / "run"))
        assert says in str(caught.value), settings
    settled = open_data(
        recipes.read(str(path), ["data.targets=[age,at]", "train.loss=mse"]), RunFolder(tmp_path / "run")
    )[2]
    assert settled.data.classes == 4
    refused = command("train", path, "--set", "data.targets=[weight]", "--run", tmp_path / "run")
    assert refused.returncode == 2 and "no field 'weight'" in refused.stderr and not (tmp_path / "run").exists()
    refused = command("train", path, "--set", f"data.train={people.root}/people.csv", "--run", tmp_path / "run")
    assert refused.returncode == 2 and "index this table first" in refused.stderr

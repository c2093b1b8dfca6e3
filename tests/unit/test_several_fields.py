"""Texts, bytes and further images: each sample has its own, by both loaders, wherever they lie; what does not fit is
refused by name."""

import json
import tarfile

import numpy as np
import pytest
import torch
from conftest import write_recipe
from PIL import Image

from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.data import archive, loader, manifest, pack, show, stage, table, verify
from hpc_lbsgd.data import files as data_files
from hpc_lbsgd.data.dali import DaliLoader
from hpc_lbsgd.data.fields import Field, asked
from hpc_lbsgd.data.source import Source
from hpc_lbsgd.data.storage import Request
from hpc_lbsgd.errors import RequestError, RunError
from hpc_lbsgd.recipe import Data
from hpc_lbsgd.records import RunFolder
from hpc_lbsgd.train import prepare

N, CPU = 13, torch.device("cpu")
WANTED = ["x", "right:image", "caption:text", "sound:bytes"]
FIELDS = {"x": Field("int"), "right": Field("image"), "caption": Field("text"), "sound": Field("bytes")}
TEXTS = [f'é {i}\n,"' for i in range(N)]
SECTION = {
    "channels": 1, "mean": [0.0], "std": [1.0], "image_size": 16, "inputs": ["image", "caption", "right"],
    "targets": ["sound", "x"], "encode": {"caption": "test_several_fields:codes"},
}  # fmt: skip


def codes(text):
    return np.frombuffer(text.encode().ljust(9)[:9], np.uint8)  # read-only, as many tokenizers' are


def numbers(data):
    return [len(data), sum(data)]


def ragged(text):
    return list(range(len(text)))


MEMORY = torch.zeros(9, dtype=torch.uint8)


def reusing(text):
    MEMORY[:] = torch.from_numpy(codes(text).copy())
    return MEMORY


def mixed(text):
    return [len(text) + 0.5 if "10" in text else 1]


def failing(text):
    raise KeyError("no such token")


def write(root, sizes, orientations=None):
    """A table of images, each with its negative, a text and as many bytes as its number."""
    root.mkdir(parents=True, exist_ok=True)
    rng, rows = np.random.default_rng(1), []
    for i, (width, height) in enumerate(sizes):
        pixels, exif = rng.integers(0, 256, (height, width), np.uint8), Image.Exif()
        if orientations:
            exif[0x0112] = orientations[i]
        Image.fromarray(pixels).save(root / f"{i:02d}.png", exif=exif)
        Image.fromarray(255 - pixels).save(root / f"{i:02d}-r.png", exif=exif)
        (root / f"{i}.pcm").write_bytes(bytes(range(i)))
        rows.append({"path": f"{i:02d}.png", "x": i, "right": f"{i:02d}-r.png", "caption": TEXTS[i]})
        rows[-1]["sound"] = f"{i}.pcm"
    (root / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root / "t.jsonl"


def index(path, wanted=WANTED, **named):
    return table.index(path, processes=1, wanted=wanted, **named)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("places")
    folder = index(write(root / "set", [(16, 16)] * N))
    keep = pack.pack(folder.path, root / "keep", pack.Encoding(), 0.02, 1)
    assert len(keep.shards) > 1
    (root / "tars").mkdir()
    for shard in keep.shards:
        (root / "tars" / shard["name"]).symlink_to(keep.root / shard["name"])
    return {
        "folder": folder,
        "keep": keep,
        "raw": pack.pack(folder.path, root / "raw", pack.Encoding("raw", channels=1), 0.02, 1),
        "webdataset": archive.index(root / "tars", processes=1, wanted=WANTED),
        "staged": stage.stage(keep, root / "local"),
    }


def made(m, data, requests, train=True, bound=None):
    """Copies of what batches hold."""
    loading = loader.create(data, m, 3, train, 8, 2, 2, False, CPU, bound)
    inputs = lambda b: b.inputs if isinstance(b.inputs, dict) else {"alone": b.inputs}  # noqa: E731
    return [({k: v.clone() for k, v in inputs(b).items()}, b.labels) for b in loading.batches(requests)]


def test_they_are_the_same_set_wherever_they_lie(places):
    for m in places.values():
        assert m.own_fields == FIELDS and not verify.verify(m.path, 1).findings
        m.check_files()
    assert len({places[name].fingerprint for name in ("folder", "keep", "staged")}) == 1
    with tarfile.open(places["keep"].root / places["keep"].shards[0]["name"]) as tar:
        names = tar.getnames()
    assert names[:4] == [f"000000000{end}" for end in (".png", ".right.png", ".sound.pcm", ".json")]
    part = manifest.pick(places["keep"], places["keep"].root / "part.arrow", np.array([4, 2]))
    assert part.values("caption")[np.arange(2)] == [TEXTS[4], TEXTS[2]]


@pytest.mark.parametrize("kind", ["torchvision", "dali"])
def test_each_sample_has_its_own(places, kind):
    data = Data(**SECTION, loader=kind, augment="pad-crop", crop_padding=3)
    requests, first = [Request(4, np.array(s)) for s in ([5, 0, 11, 3], [7])], None  # a tail of one sample
    for m in places.values():
        for bound in (None, 1e-6):
            found = made(m, data, requests, bound=bound)
            for (inputs, labels), request in zip(found, requests, strict=True):
                mine = request.samples.tolist()
                assert list(inputs) == ["image", "caption", "right"] and list(labels) == ["sound", "x"]
                assert inputs["caption"].tolist() == [codes(TEXTS[i]).tolist() for i in mine]
                assert inputs["caption"].dtype == torch.int64 and labels["x"].tolist() == mine
                assert [s.tolist() for s in labels["sound"]] == [list(range(i)) for i in mine]
                assert all(s.dtype == torch.uint8 for s in labels["sound"])
                inside = (inputs["image"] + inputs["right"]) == 255  # one window, one mirror image of both
                assert inside.any() and ((inputs["image"] == 0) & (inputs["right"] == 0))[~inside].all()
            first = first or found
            for (one, _), (other, _) in zip(first, found, strict=True):
                assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", ["torchvision", "dali"])
def test_photos_of_any_size_and_any_side_up_have_one_window(tmp_path, kind):
    m = index(write(tmp_path, [(60, 40), (40, 60), (33, 90)] * 4, [1 + i % 8 for i in range(12)]))
    data = Data(**SECTION | {"image_size": 32}, loader=kind, eval_resize=36, orientation="apply")
    for train in (True, False):
        for inputs, _ in made(m, data, [Request(2, np.arange(8)), Request(2, np.arange(8, 12))], train):
            assert ((inputs["image"] + inputs["right"]) - 255).abs().max() <= 2  # scaling rounds each


def test_where_dali_does_all_pictures_are_one_batch(tmp_path):
    """As on GPUs: turned pictures are found again among those of all samples."""
    m = index(write(tmp_path, [(60, 40), (40, 60), (33, 90)] * 4, [1 + i % 8 for i in range(12)]))
    data = Data(**SECTION | {"image_size": 32}, orientation="apply", augment="resized-crop")
    requests = [Request(2, np.arange(8)), Request(2, np.arange(8, 12))]
    whole = DaliLoader(Source(data, m, 3, True), 8, 1, 2, False, CPU, whole=True)
    for batch, (inputs, labels) in zip(whole.batches(requests), made(m, data, requests), strict=True):
        assert torch.equal(batch.inputs["caption"], inputs["caption"]) and batch.labels["x"].equal(labels["x"])
        for name in ("image", "right"):
            assert (batch.inputs[name] - inputs[name]).abs().max() <= 6  # noise, by two resizers


@pytest.mark.parametrize("kind", ["torchvision", "dali"])
def test_one_input_is_its_tensor_and_where_none_is_an_image_none_is_read(places, tmp_path, kind):
    section = SECTION | {"inputs": ["sound"], "targets": ["right"], "encode": {"sound": "test_several_fields:numbers"}}
    ((inputs, right),) = made(places["keep"], Data(**section, loader=kind, augment="none"), [Request(0, np.array([3]))])
    assert inputs["alone"].tolist() == [[3, 3]] and right.shape == (1, 1, 16, 16)
    m = index(write(tmp_path, [(16, 16)] * 3))
    (tmp_path / "01.png").write_bytes(b"no picture any more")
    section |= {"targets": ["x"], "image_size": 8}  # nor has an image a size that must fit
    ((inputs, x),) = made(m, Data(**section, loader=kind, augment="none"), [Request(0, np.array([1, 2]))])
    assert inputs["alone"].tolist() == [[1, 0], [2, 1]] and x.tolist() == [1, 2]


@pytest.mark.parametrize("kind", ["torchvision", "dali"])
@pytest.mark.parametrize("file", ["03-r.png", "3.pcm"])
def test_a_file_that_went_bad_is_found_and_stood_in_for(tmp_path, kind, file):
    m = index(write(tmp_path, [(16, 16)] * N))
    whole = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(b"\0" * len(whole) if "png" in file else whole[1:])
    ((path, what, _),) = (tuple(f) for f in verify.verify(m.path, 1).findings)
    assert path == "03.png" and what == ("changed" if "png" in file else "missing")
    data, request = Data(**SECTION, loader=kind, augment="none"), [Request(0, np.array([2, 3, 4]))]
    with pytest.raises(RunError, match=file):
        made(m, data, request)
    ((inputs, labels),) = made(m, data.model_copy(update={"on_bad_image": "skip"}), request)
    assert labels["x"].tolist()[::2] == [2, 4] and labels["x"][1] != 3
    assert [len(s) for s in labels["sound"]] == labels["x"].tolist()
    assert (inputs["image"] + inputs["right"] == 255).all()


def test_what_does_not_fit_is_named_by_the_index(tmp_path, monkeypatch):
    path = write(tmp_path, [(16, 16)] * 8, [1, 1, 6, 1, 1, 1, 1, 1])
    monkeypatch.setattr(data_files, "LARGEST", 2**12)
    Image.new("L", (8, 16)).save(tmp_path / "01-r.png")
    Image.new("L", (16, 16)).save(tmp_path / "02-r.png")
    (tmp_path / "03-r.png").write_bytes(b"none")
    (tmp_path / "4.pcm").unlink()
    (tmp_path / "5.pcm").write_bytes(bytes(5000))
    with pytest.raises(RequestError) as caught:
        index(path)
    for said in (
        "5 of 8 images",
        "01.png: right is 8x16, and the image 16x16",
        "02.png: right has EXIF's orientation 1, and the image 6",
        "03.png: right: not an image",
        "04.png: sound: [Errno 2] No such file",
        "05.png: sound: has 5000 bytes, and a sample's files are read whole: 4096 are allowed",
    ):
        assert said in str(caught.value)
    assert index(path, exclude=True).values("caption")[np.arange(3)] == [TEXTS[i] for i in (0, 6, 7)]


@pytest.mark.parametrize(
    "row, wanted, says",
    [
        ({}, ["c:text"], "has no column 'c'"),
        ({"c": None}, ["c:text"], "'c' in row 1 has no value"),
        ({"c": 7}, ["c:text"], "'c' in row 1 is '7', no text"),
        ({"c": "\ud800"}, ["c:text"], "'c' in row 1 is not UTF-8"),
        ({"c": "x" * (2**20 + 1)}, ["c:text"], "'c' in row 1 is a text of 1048577 bytes"),
        ({"c": "00.png", "a/b": "00.png"}, ["a/b:image"], "'a/b': the name of a field that is a file"),
        ({"image": "00.png"}, ["image:image"], "none of image, class"),
        ({"c": "../x"}, ["c:bytes"], "'c' in row 1 is ../x: not below"),
        ({"c": "00.png"}, ["c:mask"], "c: has pixels of mode RGB"),
    ],
)
def test_tables_that_say_otherwise(tmp_path, row, wanted, says):
    Image.new("RGB", (4, 4)).save(tmp_path / "00.png")
    (tmp_path / "t.jsonl").write_text(json.dumps({"path": "00.png"} | row))
    with pytest.raises(RequestError, match=says):
        index(tmp_path / "t.jsonl", wanted)


def test_kinds_are_as_they_are_said_or_as_the_training_set_has_them(tmp_path):
    assert asked(["a", "b:text", "c:d", ":text"]) == {"a": None, "b": "text", "c:d": None, ":text": None}
    Image.new("L", (4, 4)).save(tmp_path / "00.png")
    (tmp_path / "t.csv").write_text("path,code,note,pair\n00.png,12,,00.png\n")
    m = index(tmp_path / "t.csv", ["code:text", "note:text", "pair:image"])
    assert m.values("code")[0] == "12" and m.values("note")[0] == ""  # not a number, not nothing
    assert index(tmp_path / "t.csv", None, like=m).own_fields == m.own_fields
    (tmp_path / "b.csv").write_text('path,anno\n00.png,"[[0, 0, 2, 2]]"\n')
    with_boxes = index(tmp_path / "b.csv", ["anno:boxes"])
    assert index(tmp_path / "b.csv", None, like=with_boxes).own_fields == with_boxes.own_fields
    assert index(tmp_path / "t.csv", ["code"], like=m).own_fields == {"code": Field("text")}
    assert index(tmp_path / "t.csv", None).own_fields == {"code": Field("int")}


def tar_of(path, members):
    import io

    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_webdatasets_of_others(tmp_path):
    """As LAION's: a caption in KEY.txt, or in KEY.json; bytes under any suffix."""
    Image.new("L", (4, 4)).save(tmp_path / "p.png")
    png = (tmp_path / "p.png").read_bytes()
    pair = {"a.png": png, "a.txt": "été".encode(), "a.json": b'{"caption": "b", "n": 1}', "a.sound.FLAC": b"123"}
    pair |= {"a.right.png": png, "a.npy": b"456"}
    tar = tar_of(tmp_path / "t.tar", pair)
    m = archive.index(tar, processes=1, wanted=["txt:text", "caption:text", "sound:bytes", "npy:bytes", "right:image"])
    assert m.values("txt")[0] == "été" and m.values("caption")[0] == "b" and m.of_file("npy", "bytes")[0] == 3
    assert set(m.files) == {"sound", "npy", "right"}
    for wanted, change, says in (
        (["txt:text"], {"a.txt": b"\xff"}, "a.txt: is not UTF-8"),
        (["txt:text"], {"a.txt": b"x" * (2**20 + 1)}, "a.txt: a text of 1048577 bytes"),
        (["sound:bytes"], {"a.sound.wav": b""}, "a.sound.wav and a.sound.FLAC: both are sound of one sample"),
        (["sound:bytes"], {"b.png": png}, "1 images have no sound beside them"),
        (
            ["right.note:text"],
            {"a.right.note": b"1", "a.right.note.txt": b"2"},
            "a second text right.note of",
        ),
        (["image:bytes"], {"a.image.bin": b""}, "a.image.bin: 'image': the name of a field that is a file"),
        (["other:bytes"], {}, "'other' of .* has no file: bytes is asked for"),
        (["n:text"], {}, "'n' of .* is '1', no text"),
    ):
        with pytest.raises(RequestError, match=says):
            archive.index(tar_of(tmp_path / "w.tar", pair | change), processes=1, wanted=wanted)


def test_what_makes_numbers_of_texts_must(places):
    def of(name):
        section = SECTION | {"encode": {"caption": f"test_several_fields:{name}"}}
        return made(places["folder"], Data(**section, augment="none"), [Request(0, np.arange(9, 11))])

    with pytest.raises(RunError, match="fields:failing}: of .*09.png: KeyError: 'no such token' .*test_several"):
        of("failing")
    with pytest.raises(RunError, match=r"gave \(7,\) numbers of .*10.png, and \(6,\) of a sample before"):
        of("ragged")
    with pytest.raises(RunError, match=r"gave torch.float32 of .*10.png, and torch.int64 of a sample before"):
        of("mixed")
    with pytest.raises(RequestError, match="no attribute 'gone'"):
        of("gone")
    assert repr(of("reusing")) == repr(of("codes"))


def test_a_text_without_its_function_is_refused_before_work(places, tmp_path):
    section = {"train": str(places["folder"].path), "inputs": ["image", "caption"], "targets": ["x"]}
    path = write_recipe(tmp_path / "r.yaml", {"data": section, "train": {"loss": "mse"}})
    for settings, says in (
        ([], "caption is text, and how it becomes numbers is yours to say: data.encode = {caption:"),
        (
            ["data.encode.caption=test_several_fields:gone"],
            "data.encode.caption = test_several_fields:gone: .*no attri",
        ),
        (["data.encode.caption=test_several_fields:failing"], "00.png: KeyError: 'no such token'"),
        (["data.inputs=[image,left]"], "has no field 'left'; it has: image, caption, x, "),
        (["data.inputs=[sound]", "data.targets=[right]", "data.eval_resize=16"], "how many outputs .* for right"),
    ):
        with pytest.raises(RequestError, match=says):
            prepare.open_data(recipes.read(str(path), settings), RunFolder(tmp_path / "run"))


def test_all_of_it_is_shown(places, tmp_path):
    shown = show.look(places["keep"], show.section_for(places["keep"]), 0, 4)
    assert shown.seen.shape[3] == 2 * shown.seen.shape[2] and shown.stored[0].shape == (16, 32, 3)
    text = show.told(places["keep"], 4)
    assert f"caption {TEXTS[4]!r}" in text and "sound 4 bytes" in text
    assert "fields caption, x, right, sound" in show.page(shown)


def test_what_has_no_image_of_its_own_is_counted(tmp_path):
    """WebDataset's key ends at the first dot: of c.v2.png it is c, which has no image."""
    Image.new("L", (4, 4)).save(tmp_path / "p.png")
    png = (tmp_path / "p.png").read_bytes()
    tar = tar_of(
        tmp_path / "t.tar", {"a.png": png, "a.txt": b"x", "b.txt": b"y", "c.v2.png": png, "d.raw": b"z", "a.raw": b""}
    )
    m = archive.index(tar, processes=1, wanted=["txt:text", "raw:bytes"])
    assert len(m) == 1
    assert m.header["left_out"] == {
        ".v2.png without its image": 1,
        "txt without its image": 1,
        "raw without its image": 1,
    }

"""Boxes stay around what they were drawn around, by both loaders, in folders and packs."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from hpc_lbsgd.data import archive, boxes, loader, manifest, pack, table
from hpc_lbsgd.data.fields import Field
from hpc_lbsgd.data.storage import Request
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.recipe import Data, Train
from hpc_lbsgd.train import losses

CPU = torch.device("cpu")
WHOLE = {"channels": 1, "mean": [0.0], "std": [1.0], "targets": ["boxes"]}


def write(root, sizes, orientation=None):
    """Images with none to two bright rectangles of their own grey, which is the fifth number of their boxes."""
    (root / "i").mkdir(parents=True)
    rng, rows = np.random.default_rng(3), []
    for i, (width, height) in enumerate(sizes):
        pixels, found = np.zeros((height, width), np.uint8), []
        for number in range(i % 3):  # one in the left half, one in the right
            x0 = number * (width // 2) + int(rng.integers(0, width // 8))
            y0 = int(rng.integers(0, height // 3))
            x1, y1 = x0 + width // 3, y0 + height // 2
            pixels[y0:y1, x0:x1] = 100 + 100 * number
            found.append([x0, y0, x1, y1, 100 + 100 * number])
        exif = Image.Exif()
        if orientation:
            exif[0x0112] = orientation[i]
        Image.fromarray(pixels).save(root / "i" / f"{i:02d}.png", exif=exif)
        rows.append(json.dumps({"path": f"i/{i:02d}.png", "boxes": found}))
    (root / "t.jsonl").write_text("\n".join(rows))
    return table.index(root / "t.jsonl", processes=1)


def made(m, data, requests, train=True, **named):
    loading = loader.create(data, m, 5, train, 12, 2, 2, False, CPU, **named)
    return [(b.inputs[:, 0].clone(), b.labels) for b in loading.batches(requests)]


def around(pixels):
    """The box of the pixels that are there; None where there are none."""
    ys, xs = np.nonzero(pixels.numpy())
    return [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] if len(xs) else None


@pytest.mark.parametrize("kind", ["torchvision", "dali"])
@pytest.mark.parametrize("augment", ["none", "flip", "pad-crop"])
def test_to_the_pixel_where_nothing_is_scaled(tmp_path, kind, augment):
    m = write(tmp_path / "set", [(24, 24)] * 12)
    keep = pack.pack(m.path, tmp_path / "keep", pack.Encoding(), 0.005, 1)
    assert keep.fingerprint == m.fingerprint and len(keep.shards) > 1
    assert keep.own_fields == {"boxes": Field("boxes", 5)}
    for found in (m, keep):
        found.check_files()
    data = Data(**WHOLE, loader=kind, augment=augment, image_size=24, crop_padding=5)
    requests = [Request(1, np.array([7, 0, 11, 5, 2])), Request(1, np.array([8]))]
    first = made(m, data, requests)
    for images, found in first:
        assert isinstance(found, list) and [b.dtype for b in found] == [torch.float32] * len(images)
        for image, mine in zip(images, found, strict=True):
            assert mine.shape[1] == 5
            for box in mine.tolist():
                area = (box[2] - box[0]) * (box[3] - box[1])
                assert around(image == box[4]) == (box[:4] if area else None)
    assert [len(b) for b in first[0][1]] == [1, 0, 2, 2, 2]
    for other in (made(keep, data, requests), made(m, data, requests, prefetch_mb=1e-6)):
        for (a, b), (c, d) in zip(first, other, strict=True):
            assert torch.equal(a, c) and all(map(torch.equal, b, d))


@pytest.mark.parametrize("orientation", ["ignore", "apply"])
def test_photos_of_any_size_and_any_side_up(tmp_path, orientation):
    m = write(tmp_path / "set", [(60, 40), (45, 60), (48, 90)] * 8, [1 + (i // 3) % 8 for i in range(24)])
    upright = pack.pack(m.path, tmp_path / "up", pack.Encoding("raw", None, 50, 90, 1, True), 1, 1)
    data = Data(**WHOLE, loader="torchvision", image_size=64, eval_resize=64, orientation=orientation)
    checked = 0
    for found, train in ((m, True), (m, False), (upright, True)):
        ((images, targets),) = made(found, data, [Request(2, np.arange(24))], train)
        for image, mine in zip(images, targets, strict=True):
            for box in mine[-1:].tolist():  # the brightest
                seen = around(image > box[4] - 50)
                if seen and min(box[2] - box[0], box[3] - box[1]) > 8:
                    assert np.abs(np.array(seen) - box[:4]).max() <= 2.5, (seen, box)
                    checked += 1
    assert checked > 40


def test_a_box_that_is_left_out_has_no_area_and_keeps_its_place():
    found = boxes.seen(np.array([[0, 0, 4, 4, 7.0], [6, 6, 9, 8, 8.0]]), (5, 5, 10, 10), 1, (20, 20))
    assert found.tolist() == [[0, 0, 0, 0, 7], [2, 2, 8, 6, 8]]
    assert boxes.seen(np.empty((0, 4)), (0, 0, 5, 5), 6, (9, 9), True).shape == (0, 4)


@pytest.mark.parametrize(
    "value, says",
    [
        ([[1, 2, 3]], r"has \[1, 2, 3\]: a box is \[x0, y0, x1, y1\]"),
        ([[1, 2, 3, 4], [1, 2, 3, 4, 5]], "a box is"),
        ([[5, 2, 3, 4]], "second corner is not right of"),
        ([[1, 2, 3, float("nan")]], "not all of it are finite"),
        ([[1, 2, 3, "4"]], "not all of it are finite"),
        ([[1, 2, 3, 10**400]], "not all of it are finite"),
        ([[1, 2, 3, 4], None], "a box is"),
        (None, r"has no value; an image without any has \[\]"),
    ],
)
def test_what_is_no_box_is_named_with_its_row(tmp_path, value, says):
    rows = [{"path": "a.png", "boxes": [[1, 2, 3, 4]]}, {"path": "b.png", "boxes": value}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(RequestError, match=f"'boxes' in row 2 {'.*' if value else ''}{says}"):
        table.index(tmp_path / "t.jsonl", processes=1)


def test_rows_without_boxes_left_out_rows_and_tars(tmp_path):
    m = write(tmp_path / "set", [(24, 24)] * 9)
    (tmp_path / "tars").mkdir()
    keep = pack.pack(m.path, tmp_path / "keep", pack.Encoding(), 1, 1)
    (tmp_path / "tars" / "a.tar").symlink_to(keep.root / keep.shards[0]["name"])
    tar = archive.index(tmp_path / "tars", processes=1, wanted=["boxes"])
    part = manifest.pick(tar, tmp_path / "part.arrow", np.array([8, 0, 1]))
    for found, rows in ((tar, range(9)), (part, [8, 0, 1])):
        for i, row in enumerate(rows):
            assert np.array_equal(found.values("boxes")[[i]][0], m.values("boxes")[[row]][0])
    (m.path.parent / "exclude.txt").write_text("i/01.png\n")
    less = manifest.Manifest(m.path)
    assert [len(b) for b in less.values("boxes")[np.arange(8)]] == [0, 2, 0, 1, 2, 0, 1, 2]
    with pytest.raises(RequestError, match="it is of numbers; for a class cross-entropy"):
        losses.check("mse", ["boxes"], m, 2)
    own = losses.loss_function(Train(loss="test_boxes:areas"))
    assert own(torch.zeros(2, 1), [torch.ones(3, 4), torch.ones(0, 4)]) == 3


def areas(outputs, found):
    """A loss of a list of boxes for each sample."""
    return torch.stack([mine.sum() / 4 for mine in found]) + outputs[:, 0]

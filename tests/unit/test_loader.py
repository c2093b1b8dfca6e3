"""DALI and torchvision make the same pictures from the same request."""

import time

import numpy as np
import pytest
import torch
from conftest import write_images
from PIL import Image

from hpc_lbsgd.data import augment, loader
from hpc_lbsgd.data import tree as trees
from hpc_lbsgd.data.ahead import Cut
from hpc_lbsgd.data.storage import Request
from hpc_lbsgd.errors import RequestError, RunError
from hpc_lbsgd.recipe import Data

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """JPEGs of several shapes with smooth colours and edges; one says by EXIF that it lies on its side."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(5)
    for i in range(24):
        width, height = [(500, 375), (375, 500), (640, 300), (257, 513)][i % 4]
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        image = coarse.resize((width, height), Image.Resampling.BICUBIC)
        (root / f"c{i % 2}").mkdir(exist_ok=True)
        exif = Image.Exif()
        if i == 3:
            exif[0x0112] = 6  # orientation: rotate by 90 degrees
        image.save(root / f"c{i % 2}" / f"{i:02d}.jpg", quality=92, exif=exif)
    return trees.index(root, processes=1)


def make(data: Data, m, kind: str, train: bool, requests: list[Request], max_batch: int = 8, channels_last=True):
    made = loader.create(data.model_copy(update={"loader": kind}), m, 3, train, max_batch, 1, 2, channels_last, CPU)
    return [(x.clone(), y.clone()) for x, y, _ in made.batches(requests)]


def requests_of(samples: list[list[int]], epoch: int = 2) -> list[Request]:
    return [Request(epoch, np.array(s)) for s in samples]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("channels", [3, 1])
def test_same_crops_from_photos(photos, train, channels):
    """Only the decoders differ. Measured: equal in colour; in grey one level of 255 apart in 3 pixels of 1,000."""
    data = Data(channels=channels, mean=[110.0] * channels, std=[1.0] * channels, image_size=96, eval_resize=112)
    batches = requests_of([[0, 5, 3, 9, 11, 2, 7, 1], [20, 21], [23]])
    dali, torchvision = (make(data, photos, kind, train, batches) for kind in ("dali", "torchvision"))
    for (a, la), (b, lb), request in zip(dali, torchvision, batches, strict=True):
        assert a.shape == (len(request.samples), channels, 96, 96)
        assert torch.equal(la, lb)
        assert (a - b).abs().max() <= 1 and (a - b).abs().mean() < 0.01
        assert a.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", ["none", "flip", "pad-crop"])
def test_same_pixels_where_nothing_is_resized(tmp_path, kind):
    m = trees.index(write_images(tmp_path, 20, 16), processes=1)
    data = Data(channels=1, image_size=16, augment=kind, crop_padding=3, eval_resize=0, mean=[0.0], std=[1.0])
    batches = requests_of([list(range(8)), list(range(8, 16)), [17, 3, 17]])
    for train in (True, False):
        for (a, _), (b, _) in zip(*(make(data, m, k, train, batches) for k in ("dali", "torchvision")), strict=True):
            assert torch.equal(a, b)


def test_a_sample_does_not_depend_on_its_batch(photos):
    data = Data(image_size=64)
    for kind in ("dali", "torchvision"):
        ((together, _),) = make(data, photos, kind, True, requests_of([[4, 8, 15, 16]]))
        alone = [x[0] for x, _ in make(data, photos, kind, True, requests_of([[4], [8], [15], [16]]))]
        assert torch.equal(together, torch.stack(alone))
        ((other_epoch, _),) = make(data, photos, kind, True, requests_of([[4, 8, 15, 16]], epoch=3))
        assert not torch.equal(together, other_epoch)


@pytest.mark.parametrize("train", [True, False])
def test_a_batch_is_left_alone_until_the_next_is_asked_for(photos, train):
    """Batches are made ahead of time, in memory that is used again."""
    for kind in ("dali", "torchvision"):
        data = Data(image_size=64, loader=kind)
        made = loader.create(data, photos, 3, train, 8, 2, 2, True, CPU)
        for images, _, _ in made.batches(requests_of([[i, i + 1] for i in range(12)])):
            before = images.clone()
            time.sleep(0.05)  # the next ones are being made
            assert torch.equal(images, before)


@pytest.mark.parametrize("kind, prefetch_mb", [("dali", None), ("torchvision", None), ("dali", 1.0)])
def test_drained_loader_starts_again(photos, kind, prefetch_mb):
    """After its last request, and where the requests were cut short with some batches made ahead."""
    data, requests = Data(image_size=64, loader=kind), requests_of([[i, i + 1] for i in range(12)])
    made = loader.create(data, photos, 3, False, 8, 1, 2, False, CPU, prefetch_mb)
    first = [x.clone() for x, _, _ in made.batches(requests)]
    for begin in (0, 5):
        asked = Cut(requests[begin:])
        again = made.batches(asked)
        for i in range(begin, begin + 3):
            assert torch.equal(next(again).inputs, first[i])
        asked.over = True
        assert len(list(again)) < 9  # no more than was made ahead
    assert len(list(made.batches(Cut(requests)))) == 12


@pytest.mark.parametrize("kind", ["dali", "torchvision"])
def test_an_image_that_went_bad_is_named(tmp_path, kind):
    root = write_images(tmp_path / "d", 8, 16)
    m = trees.index(root, processes=1)
    path = root / "class-1" / "0001.png"
    size = path.stat().st_size
    path.write_bytes(b"\0" * size)
    data = Data(channels=1, image_size=16, augment="none", eval_resize=0, mean=[0.0], std=[1.0])
    with pytest.raises(RunError, match="class-1/0001.png: cannot be decoded"):
        make(data, m, kind, True, requests_of([list(range(8))]))
    path.write_bytes(b"\0" * (size + 1))
    with pytest.raises(RunError, match=f"0001.png: {size + 1} bytes or more, {size} when it was indexed"):
        make(data, m, kind, True, requests_of([list(range(8))]))


def test_images_of_another_size_are_refused_before_work(photos):
    with pytest.raises(RequestError, match="data.image_size = 32, but 24 of 24 images"):
        loader.check_sizes(Data(image_size=32, augment="flip"), photos, True)


def test_windows_are_whole_pixels_inside_the_image():
    n = 20_000
    rng = np.random.default_rng(1)
    width, height = rng.integers(1, 700, n), rng.integers(1, 700, n)
    w = augment.resized_crop(0, 1, np.arange(n), width, height, (0.08, 1.0), (3 / 4, 4 / 3))
    assert (w.w >= 1).all() and (w.h >= 1).all() and (w.x >= 0).all() and (w.y >= 0).all()
    assert (w.x + w.w <= width).all() and (w.y + w.h <= height).all()
    assert 0.48 < w.flip.mean() < 0.52


def test_windows_are_distributed_as_torchvisions():
    """Share of the area, aspect and place, against RandomResizedCrop.get_params on 500x375 pictures."""
    from torchvision.transforms import RandomResizedCrop

    n, rng = 4000, torch.Generator().manual_seed(0)
    torch.manual_seed(int(torch.randint(1 << 30, (), generator=rng)))
    picture = torch.empty(3, 375, 500)
    theirs = np.array([RandomResizedCrop.get_params(picture, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(n)])
    w = augment.resized_crop(0, 1, np.arange(n), np.full(n, 500), np.full(n, 375), (0.08, 1.0), (3 / 4, 4 / 3))
    ours = np.stack([w.y, w.x, w.h, w.w], axis=1)
    for measure in (lambda p: p[:, 2] * p[:, 3], lambda p: p[:, 3] / p[:, 2], lambda p: p[:, 0], lambda p: p[:, 1]):
        a, b = measure(theirs), measure(ours)
        spread = np.sqrt((a.var() + b.var()) / n)
        assert abs(a.mean() - b.mean()) < 4.5 * spread
        assert abs(np.quantile(a, 0.9) - np.quantile(b, 0.9)) < 10 * spread


def test_augmentation_is_a_function_of_seed_epoch_and_sample():
    samples, size = np.array([5, 9, 5]), np.full(3, 300)
    a = augment.resized_crop(0, 1, samples, size, size, (0.08, 1.0), (3 / 4, 4 / 3))
    b = augment.resized_crop(0, 1, samples[::-1], size, size, (0.08, 1.0), (3 / 4, 4 / 3))
    assert (a.x[0], a.y[0], a.w[0], a.h[0]) == (a.x[2], a.y[2], a.w[2], a.h[2])
    assert np.array_equal(a.x, b.x[::-1]) and np.array_equal(a.flip, b.flip[::-1])

"""Read-ahead is bounded in bytes, and a bound changes no bit."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import write_images
from PIL import Image

from hpc_lbsgd.data import loader
from hpc_lbsgd.data import tree as trees
from hpc_lbsgd.data.bounded import Bounded
from hpc_lbsgd.data.source import Source
from hpc_lbsgd.data.storage import Request
from hpc_lbsgd.recipe import Data

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Small pictures, and a few that are larger."""
    root = write_images(tmp_path_factory.mktemp("mixed"), 24, 48, suffix=".jpg")
    rng = np.random.default_rng(0)
    for i in range(3):
        coarse = Image.fromarray(rng.integers(0, 255, (9, 12, 3), dtype=np.uint8))
        coarse.resize((600, 400), Image.Resampling.BICUBIC).save(root / "class-0" / f"large-{i}.jpg")
    return trees.index(root, processes=1)


@pytest.mark.parametrize("kind", ["torchvision", "dali"])
@pytest.mark.parametrize("train", [True, False])
def test_a_bound_changes_no_bit(mixed, kind, train):
    data = Data(loader=kind, image_size=32, eval_resize=36)
    order = np.random.default_rng(1).permutation(len(mixed))
    requests = [Request(0, order[:9]), Request(0, order[9:10]), Request(1, order[10:]), Request(2, order[:16])]
    found = []
    for bound in (None, 2048, 1, 1e-6):  # MB
        made = loader.create(data, mixed, 3, train, 17, 2, 2, True, CPU, bound)
        found.append([(x.clone(), y.clone()) for x, y, _ in made.batches(requests)])
        assert [len(y) for _, y in found[-1]] == [9, 1, 17, 16]
        assert all(x.is_contiguous(memory_format=torch.channels_last) for x, _ in found[-1])
        again = [x.clone() for x, _, _ in made.batches(requests[:2])]  # drained, and asked again
        assert all(torch.equal(a, b[0]) for a, b in zip(again, found[-1], strict=False))
    for other in found[1:]:
        assert all(torch.equal(a, b) and torch.equal(c, d) for (a, c), (b, d) in zip(found[0], other, strict=True))


def test_parts_are_within_the_bound_and_ordinary_batches_whole(mixed):
    source = Source(Data(image_size=32), mixed, 0, True)
    asked = Request(0, np.arange(len(mixed)))
    costs = source.costs(asked.samples)
    for bound in (1, 20_000, 800_000, costs.sum()):
        parts = Bounded(None, source, bound).parts(asked)
        assert np.concatenate([p.samples for p in parts]).tolist() == asked.samples.tolist()
        assert all(costs[p.samples].sum() <= bound or len(p.samples) == 1 for p in parts)
    assert len(parts) == 1 and parts[0] is asked
    photos = np.full(250, 500 * 375 * 3 + 110_000)  # an evaluation's batch of ImageNet's, at machine's defaults
    assert photos.sum() <= 2048e6 / (2 + 2)


@pytest.mark.parametrize("kind", ["torchvision", "dali"])
def test_stand_ins_are_the_same_in_parts(mixed, tmp_path, kind):
    root = write_images(tmp_path, 12, 48, suffix=".png")
    m = trees.index(root, processes=1)
    broken = root / "class-1" / "0005.png"
    broken.write_bytes(b"\0" * broken.stat().st_size)
    data = Data(loader=kind, image_size=32, on_bad_image="skip")
    whole, parts = (
        list(loader.create(data, m, 3, True, 12, 1, 2, True, CPU, bound).batches([Request(0, np.arange(12))]))[0]
        for bound in (None, 0.01)
    )
    assert torch.equal(whole.inputs, parts.inputs) and whole.replaced == parts.replaced == 1


PEAK = """
import json, sys
import numpy as np, torch
from hpc_lbsgd.data import loader
from hpc_lbsgd.data.manifest import Manifest
from hpc_lbsgd.data.storage import Request
from hpc_lbsgd.recipe import Data
path, kind, bound = sys.argv[1:]
m = Manifest(path)
data = Data(loader=kind, image_size=64)
made = loader.create(data, m, 1, True, 24, 1, 2, True, torch.device("cpu"), float(bound))
peaks = []
for first in (True, False):  # one picture for what a loader takes anyhow; then all
    some = [Request(0, np.arange(1))] * 2 if first else [Request(e, np.arange(len(m))) for e in range(4)]
    for _ in made.batches(some):
        pass
    status = open("/proc/self/status").read().splitlines()  # getrusage's peak is the parent's too
    peaks.append(int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 1024)
print(json.dumps(peaks))
"""


@pytest.mark.parametrize("kind", ["torchvision", "dali"])
def test_large_photos_take_no_more_than_the_bound(tmp_path, kind):
    """24 photos of 2,000 x 2,000: 290 MB decoded, a batch. At most 100 MB may be under way."""
    (tmp_path / "c").mkdir()
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 12, 3), dtype=np.uint8))
    coarse.resize((2000, 2000), Image.Resampling.BICUBIC).save(tmp_path / "c" / "00.jpg")
    for i in range(1, 24):
        os.link(tmp_path / "c" / "00.jpg", tmp_path / "c" / f"{i:02d}.jpg")
    m = trees.index(tmp_path, processes=1)
    grown = {}
    for bound in (100, 100_000):
        words = [sys.executable, "-c", PEAK, str(m.path), kind, str(bound)]
        job = subprocess.run(words, capture_output=True, text=True, timeout=120)
        assert job.returncode == 0, job.stderr
        before, after = json.loads(job.stdout)
        grown[bound] = after - before
    print(kind, grown)
    assert grown[100] < 200 and grown[100] < 0.6 * grown[100_000], grown

"""DALI's graphs for GPUs, where there is none: each is built and serialised as it would be there, and the same graph on
the CPU makes the pixels that finish.py makes."""

import numpy as np
import pytest
import torch
from conftest import write_images
from PIL import Image

from hpc_lbsgd.data import dali, loader, pack
from hpc_lbsgd.data import tree as trees
from hpc_lbsgd.data.source import Source
from hpc_lbsgd.data.storage import Request
from hpc_lbsgd.errors import RunError
from hpc_lbsgd.recipe import Data

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
MEAN, STD = [110.0, 120.0, 130.0], [50.0, 60.0, 70.0]
WAYS = ["flip", "pad-crop", "resized-crop"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Smooth JPEGs of one size, as files and as packed pixels."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(5)
    (root / "jpeg" / "c0").mkdir(parents=True)
    for i in range(12):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((64, 64), Image.Resampling.BICUBIC).save(root / "jpeg" / "c0" / f"{i:02d}.jpg", quality=92)
    files = trees.index(root / "jpeg", processes=1)
    raw = pack.pack(files.path, root / "raw", pack.Encoding("raw"), 1.0, 1)
    return {"jpeg": files, "raw": raw}


def data_of(way: str) -> Data:
    size = 48 if way == "resized-crop" else 64
    return Data(image_size=size, augment=way, crop_padding=4, eval_resize=0, mean=MEAN, std=STD)


@pytest.mark.parametrize("stored", ["jpeg", "raw"])
@pytest.mark.parametrize("way", WAYS)
def test_the_graph_for_a_gpu_is_accepted(photos, way, stored, monkeypatch):
    """Every argument is known to the operator for that device; what runs where is as meant."""
    from nvidia.dali import Pipeline

    graphs = []

    def build(self):
        self._device_id = None  # all that it wants of a device before it runs is that there is one
        assert self.exec_dynamic  # outputs are ours to keep
        graphs.append(self.serialize().decode("latin-1"))

    monkeypatch.setattr(Pipeline, "build", build)
    dali.DaliLoader(Source(data_of(way), photos[stored], 3, True), 8, 1, 2, True, GPU)
    (graph,) = graphs
    assert ("mixed" in graph) == (stored == "jpeg") == ("jpeg_fancy_upsampling" in graph)
    assert "CropMirrorNormalize" in graph and "gpu" in graph and "no_copy" in graph


@pytest.mark.parametrize("stored", ["jpeg", "raw"])
@pytest.mark.parametrize("way", WAYS)
def test_the_same_graph_on_the_cpu_makes_the_pixels_of_finish(photos, way, stored):
    """Equal within float32 where nothing is resized. DALI keeps fractions of a level; torch rounds to whole ones, after
    rows and after columns."""
    m, data, found = photos[stored], data_of(way), []
    for whole in (True, False):
        made = dali.DaliLoader(Source(data, m, 3, True), 8, 1, 2, True, CPU, whole=whole)
        requests = [Request(2, np.array(s)) for s in ([0, 5, 3, 9, 11, 2, 7, 1], [4, 4, 10])]
        batches = [batch.inputs if whole else batch.inputs.clone() for batch in made.batches(requests)]
        assert all(images.is_contiguous(memory_format=torch.channels_last) for images in batches)
        found.append(torch.cat(batches))
    levels = (found[0] - found[1]).abs() * torch.tensor(STD).view(3, 1, 1)
    assert levels.max() <= (1.25 if way == "resized-crop" else 1e-4), levels.max()


def test_gpus_that_dali_does_not_know_get_what_cpus_decode(photos, monkeypatch):
    """AMD's, which torch calls cuda too."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    made = dali.DaliLoader(Source(data_of("flip"), photos["jpeg"], 3, True), 8, 1, 2, True, GPU)
    assert not made.whole and made._pipeline.device_id is None


def test_a_bad_image_is_found_by_pillow_or_by_one_probe(tmp_path, monkeypatch):
    """A pipeline an image took minutes on a GPU: each is built, with a decoder of its own."""
    root = write_images(tmp_path / "d", 24, 16, suffix=".jpg")
    m = trees.index(root, processes=1)
    (root / "class-1" / "0005.jpg").write_bytes(b"\0" * int(m.sizes[next(i for i in range(24) if "0005" in m.key(i))]))
    built, build = [], dali.DaliLoader._build
    monkeypatch.setattr(dali.DaliLoader, "_build", lambda self, *a, **k: built.append(a[0]) or build(self, *a, **k))

    def read() -> None:
        built.clear()
        made = loader.create(Data(channels=1, image_size=16, augment="none", eval_resize=0, mean=[0.0], std=[1.0]),
                             m, 3, True, 8, 1, 2, True, CPU)  # fmt: skip
        list(made.batches([Request(0, np.arange(start, start + 8)) for start in (0, 8, 16)]))

    with pytest.raises(RunError, match=r"0005\.jpg: cannot be decoded \(Pillow"):
        read()
    assert built == [8]
    monkeypatch.setattr(dali, "pixels", lambda content, channels: None)  # as one that Pillow accepts
    with pytest.raises(RunError, match=r"0005\.jpg: cannot be decoded \(DALI"):
        read()
    assert built == [8, 1]

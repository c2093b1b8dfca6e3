"""The seam of loaders: what they are given (requests, and a source that knows their bytes, windows and labels), and
what they give (batches). loader.py chooses one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch

from hpc_lbsgd.data import augment, boxes, masks, orientation
from hpc_lbsgd.data.fields import NOWHERE
from hpc_lbsgd.data.finish import cut
from hpc_lbsgd.data.manifest import Manifest, checksum
from hpc_lbsgd.data.order import stream_key
from hpc_lbsgd.data.storage import Request, SampleError, open_storage
from hpc_lbsgd.data.targets import Target, Targets, one_or_all
from hpc_lbsgd.errors import RequestError, RunError


class Batch(NamedTuple):
    images: torch.Tensor  # (B, C, H, W) float32, normalised
    labels: Targets  # (B,) int64 for classes; what data.targets names
    replaced: int = 0  # samples that could not be had, with others in their place


class Fetched(NamedTuple):
    """A request with its bytes."""

    asked: Request
    given: Request  # the same, with other samples in place of those that cannot be had
    contents: list[np.ndarray]  # a sample each
    masks: dict[str, np.ndarray]  # by name, uint8 (B, S, S): cut, turned and mirrored as the images will be

    @property
    def replaced(self) -> int:
        return int((self.asked.samples != self.given.samples).sum())


class Loader(Protocol):
    def batches(self, requests: Iterable[Request]) -> Iterator[Batch]:
        """One batch a request, in order, made ahead of time. To be drained before it is called again.

        Images may lie in memory that is used again: they are good until the next batch is asked for.
        """


class Source:
    """One part of a data set with its recipe: which bytes, windows and labels a request means."""

    def __init__(self, data, manifest: Manifest, seed: int, train: bool):
        self.data, self.manifest, self.seed, self.train = data, manifest, seed, train
        self.storage = open_storage(manifest)
        self.raw = manifest.raw_channels is not None
        self.turns = data.orientation == "apply"
        if self.turns and manifest.orientations is None:
            raise RequestError(
                f"data.orientation = apply, but {manifest.path} was made before orientations were kept; index again"
            )
        self.masks = [name for name in data.targets if name in manifest.masks]
        self._bad: set[int] = set()

    # ------------------------------------------------------------ samples and their bytes

    def fetch(self, request: Request) -> Fetched:
        """The bytes of a request; a sample known to be bad is replaced, one that cannot be read becomes known."""
        given, contents = [], []
        seen: dict[str, list] = {name: [] for name in self.masks}
        for sample in request.samples.tolist():
            while True:
                candidate = self.stand_in(request.epoch, sample)
                try:
                    content = self.storage.read(candidate)
                    found = [self._mask(name, request.epoch, candidate) for name in self.masks]
                    break
                except SampleError as problem:
                    self.refuse(problem)
            given.append(candidate)
            contents.append(content)
            for name, mask in zip(self.masks, found, strict=True):
                seen[name].append(mask)
        self.check(np.array(given, np.int64))
        stacked = {name: np.stack(some) for name, some in seen.items()}
        return Fetched(request, Request(request.epoch, np.array(given, np.int64)), contents, stacked)

    def _mask(self, name: str, epoch: int, sample: int) -> np.ndarray:
        """A sample's mask as the loss sees it, uint8 (S, S). Raises SampleError where it cannot be had."""
        content, size = self.storage.content(sample, name), self.data.image_size
        try:
            stored = masks.pixels(content)
            masks.check(stored, self.manifest.header["masks"][name])
        except ValueError as problem:
            raise SampleError(sample, f"{self.manifest.file(sample, name)}: cannot be decoded ({problem})") from None
        one = Request(epoch, np.array([sample]))
        (window,) = self.cut(one, [stored[:, :, None]], NOWHERE)
        found = masks.resized(window[:, :, 0], size, size) if self.resizes else window[:, :, 0]
        return found[:, ::-1] if self.windows(one).flip[0] else found

    def check(self, samples: np.ndarray) -> None:
        """Refuse what the start did not look at in a large set: labels that no class has, sizes that do not fit."""
        m, size = self.manifest, self.data.image_size
        wrong = (m.labels[samples] < 0) | (m.labels[samples] >= max(len(m.classes), 1))
        if not self.resizes:
            wrong |= (m.widths[samples] != size) | (m.heights[samples] != size)
        if wrong.any():
            i = int(samples[wrong.argmax()])
            raise RunError(
                f"{m.file(i)}: class {m.labels[i]} of {len(m.classes)}, {m.widths[i]}x{m.heights[i]} pixels, in "
                f"{m.path}: it does not fit the recipe; index again, and mend data.image_size or what resizes"
            )

    def refuse(self, problem: SampleError) -> None:
        """A sample cannot be read or decoded: end the run (data.on_bad_image = error), or never ask for it again."""
        if self.data.on_bad_image == "error" or not self.train:
            raise problem
        self._bad.add(problem.sample)
        if len(self._bad) == len(self.manifest):
            raise problem

    def undecodable(self, sample: int, content: np.ndarray, reason: str) -> SampleError:
        """What to say of a sample whose bytes are there and are no image for the loader."""
        m = self.manifest
        if checksum(content) != int(m.checksums[sample]):
            why = "it changed since it was indexed; mend it, or have it left out"
        else:
            asked = ", ".join(f"{name} {version}" for name, version in m.header.get("decoders", {}).items())
            why = f"its bytes are those that were indexed, and decoded then by {asked or 'Pillow'}; have it left out"
        return SampleError(
            sample, f"{m.file(sample)}: cannot be decoded ({reason}): {why} (hpc-lbsgd data verify --exclude)"
        )

    def stand_in(self, epoch: int, sample: int) -> int:
        """`sample`, or where it is bad the first good one of a sequence that depends on (seed, epoch, sample) alone:
        the same on any rank, in any batch."""
        candidate, attempt = sample, 0
        while candidate in self._bad:
            attempt += 1
            candidate = stream_key("stand-in", self.seed, epoch, sample, attempt) % len(self.manifest)
        return candidate

    # ------------------------------------------------------------ what is made of them

    @property
    def resizes(self) -> bool:
        return self.data.augment == "resized-crop" if self.train else self.data.eval_resize > 0

    @property
    def crops(self) -> bool:
        """A window differs from the image."""
        return self.resizes or (self.train and self.data.augment == "pad-crop")

    def windows(self, request: Request) -> augment.Windows:
        """In coordinates of the stored images, which no decoder turns; flips are of upright ones."""
        width, height = (c[request.samples].astype(np.int64) for c in (self.manifest.widths, self.manifest.heights))
        if not self.turns:
            return self._chosen(request, width, height)
        how = self.manifest.orientations[request.samples]
        size = orientation.upright_sizes(width, height, how)
        return orientation.stored_windows(self._chosen(request, *size), *size, how)

    def _chosen(self, request: Request, width: np.ndarray, height: np.ndarray) -> augment.Windows:
        return augment.windows(self.data, self.seed, request.epoch, request.samples, width, height, self.train)

    def cut(self, request: Request, images: list[np.ndarray], outside: int = 0) -> list[np.ndarray]:
        """The windows of decoded images, each uint8 (h, w, C), upright; `outside` where they reach outside."""
        if self.crops:
            w = self.windows(request)
            places = zip(images, w.x.tolist(), w.y.tolist(), w.w.tolist(), w.h.tolist(), strict=True)
            images = [cut(*place, outside) for place in places]
        return self.upright(request, images)

    def upright(self, request: Request, windows: list[np.ndarray]) -> list[np.ndarray]:
        """Windows of stored images, turned where they are to be."""
        if not self.turns:
            return windows
        how = self.manifest.orientations[request.samples].tolist()
        return [np.ascontiguousarray(orientation.turned(w, o)) for w, o in zip(windows, how, strict=True)]

    def costs(self, samples: np.ndarray) -> np.ndarray:
        """Bytes that samples take while they are made: as they are stored, and their pixels."""
        m = self.manifest
        stored = m.sizes[samples].astype(np.int64)
        pixels = m.widths[samples].astype(np.int64) * m.heights[samples]
        return (stored if self.raw else stored + 3 * pixels) + pixels * len(self.masks)

    def targets(self, fetched: Fetched) -> Targets:
        """What the loss gets: int64 for classes and whole numbers, float32 for others; masks in bytes, to be widened
        where they are to be used (place.py)."""
        return one_or_all({name: self._target(name, fetched) for name in self.data.targets})

    def _boxes(self, name: str, given: Request) -> list[torch.Tensor]:
        """Of each sample, float32 (n, 4 or more), in pixels of what the model sees."""
        w, size = self.windows(given), self.data.image_size
        windows = np.stack([w.x, w.y, w.w, w.h], axis=1).tolist()
        ways = self.manifest.orientations[given.samples].tolist() if self.turns else [1] * len(windows)
        found = zip(self.manifest.values(name)[given.samples], windows, ways, w.flip.tolist(), strict=True)
        made = (boxes.seen(mine, window, way, (size, size), flip) for mine, window, way, flip in found)
        return [torch.from_numpy(one.astype(np.float32)) for one in made]

    def _target(self, name: str, fetched: Fetched) -> Target:
        if name in fetched.masks:
            return torch.from_numpy(fetched.masks[name])
        if self.manifest.fields[name].kind == "boxes":
            return self._boxes(name, fetched.given)
        values = self.manifest.values(name)[fetched.given.samples]
        return torch.from_numpy(values.astype(np.float32 if values.dtype == np.float64 else np.int64))

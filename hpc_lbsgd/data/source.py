"""The seam of loaders: what they are given (requests, and a source that knows their bytes, windows and labels), and
what they give (batches). loader.py chooses one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from hpc_lbsgd.data import augment, boxes, masks, orientation
from hpc_lbsgd.data.encoders import Encoders
from hpc_lbsgd.data.fields import FILES, IMAGE, NOWHERE, refuse_unknown
from hpc_lbsgd.data.finish import cut
from hpc_lbsgd.data.manifest import Manifest, checksum
from hpc_lbsgd.data.order import stream_key
from hpc_lbsgd.data.remote import Remote
from hpc_lbsgd.data.storage import Request, SampleError, open_storage
from hpc_lbsgd.data.targets import Inputs, Target, Targets, one_or_all
from hpc_lbsgd.errors import RequestError, RunError


class Batch(NamedTuple):
    inputs: Inputs  # images are (B, C, H, W) float32, normalised; what data.inputs names
    labels: Targets  # (B,) int64 for classes; what data.targets names
    replaced: int = 0  # samples that could not be had, with others in their place


class Fetched(NamedTuple):
    """A request with its bytes, and all that is no picture made of them. A sample may have several pictures: the first
    ones of all come first, then the second ones of all."""

    asked: Request
    given: Request  # the same, with other samples in place of those that cannot be had
    contents: list[np.ndarray]  # of each picture
    windows: augment.Windows  # of each picture: equal in all of a sample
    ways: np.ndarray | None  # of each picture: how it is turned; None where none is
    values: dict[str, Target]  # other fields of the batch, by name

    @property
    def replaced(self) -> int:
        return int((self.asked.samples != self.given.samples).sum())

    def picture(self, number: int) -> Fetched:
        """One of its pictures alone."""
        one = np.array([number])
        ways = None if self.ways is None else self.ways[one]
        given = Request(self.given.epoch, self.given.samples[one % len(self.given.samples)])
        return Fetched(given, given, [self.contents[number]], self.windows.rows(one), ways, {})


class Loader(Protocol):
    def batches(self, requests: Iterable[Request]) -> Iterator[Batch]:
        """One batch a request, in order, made ahead of time. To be drained before it is called again.

        Images may lie in memory that is used again: they are good until the next batch is asked for.
        """


class Source:
    """One part of a data set with its recipe: which bytes, windows and labels a request means. Raises RequestError for
    fields that the set does not have, or that nothing makes numbers of."""

    def __init__(self, data, manifest: Manifest, seed: int, train: bool):
        self.data, self.manifest, self.seed, self.train = data, manifest, seed, train
        self.storage = open_storage(manifest)
        self.raw = manifest.raw_channels is not None
        self.turns = data.orientation == "apply"
        if self.turns and manifest.orientations is None:
            raise RequestError(
                f"data.orientation = apply, but {manifest.path} was made before orientations were kept; index again"
            )
        refuse_unknown(data, manifest.fields, str(manifest.path))
        asked = dict.fromkeys([*data.inputs, *data.targets])
        self.pictures = [name for name in asked if manifest.fields[name].kind == IMAGE]
        self.others = [name for name in asked if name not in self.pictures]
        self.files = [name for name in asked if name in manifest.files]
        self.masks = [name for name in self.files if manifest.fields[name].kind == "mask"]
        named = [*self.pictures, *(name for name in self.files if name not in self.pictures)]
        self.read_names = [None if name == IMAGE else name for name in named]  # of each sample, in this order
        self.encoders = Encoders(data.encode, manifest)
        self._bad: set[int] = set()

    # ------------------------------------------------------------ samples and their bytes

    def fetch(self, request: Request) -> Fetched:
        """The bytes of a request; a sample known to be bad is replaced, one that cannot be read becomes known."""
        chosen, found = [], []
        for sample in request.samples.tolist():
            while True:
                candidate = self.stand_in(request.epoch, sample)
                try:
                    found.append(self._read(candidate))
                    break
                except SampleError as problem:
                    self.refuse(problem)
            chosen.append(candidate)
        given = Request(request.epoch, np.array(chosen, np.int64))
        self.check(given.samples)
        windows = self.windows(given)
        ways = self.manifest.orientations[given.samples] if self.turns else None
        values = {name: self._value(name, given.samples, windows, ways, found) for name in self.others}
        contents = [read[name] for name in self.pictures for read in found]
        each = np.tile(np.arange(len(found)), len(self.pictures))
        return Fetched(request, given, contents, windows.rows(each), None if ways is None else ways[each], values)

    def _read(self, sample: int) -> dict[str, Any]:
        """A sample's pictures as they are stored, and its other files: masks are decoded, bytes as they are. Raises
        SampleError where one cannot be had."""
        found: dict[str, Any] = {
            name: self.storage.read(sample, None if name == IMAGE else name) for name in self.pictures
        }
        for name in self.files:
            if name in found:
                continue
            found[name] = self.storage.content(sample, name)
            if name in self.masks:
                try:
                    found[name] = masks.pixels(found[name])
                    masks.check(found[name], self.manifest.header["masks"][name])
                except ValueError as problem:
                    where = self.manifest.file(sample, name)
                    raise SampleError(sample, f"{where}: cannot be decoded ({problem})") from None
        return found

    def check(self, samples: np.ndarray) -> None:
        """Refuse what the start did not look at in a large set: labels that no class has, sizes that do not fit."""
        m, size = self.manifest, self.data.image_size
        wrong = (m.labels[samples] < 0) | (m.labels[samples] >= max(len(m.classes), 1))
        if self.of_one_size:
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
        if isinstance(self.storage, Remote):
            self.storage.give_up(problem.sample)
        if len(self._bad) == len(self.manifest):
            raise problem

    def undecodable(self, fetched: Fetched, number: int, reason: str) -> SampleError:
        """What to say of a picture whose bytes are there and are no image for the loader."""
        m, count = self.manifest, len(fetched.given.samples)
        sample, name = int(fetched.given.samples[number % count]), self.pictures[number // count]
        own = None if name == IMAGE else name
        if checksum(fetched.contents[number]) != int((m.of_file(own, "checksum") if own else m.checksums)[sample]):
            why = "it changed since it was indexed; mend it, or have it left out"
        else:
            asked = ", ".join(f"{name} {version}" for name, version in m.header.get("decoders", {}).items())
            why = f"its bytes are those that were indexed, and decoded then by {asked or 'Pillow'}; have it left out"
        return SampleError(
            sample, f"{m.file(sample, own)}: cannot be decoded ({reason}): {why} (hpc-lbsgd data verify --exclude)"
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
    def of_one_size(self) -> bool:
        """Pictures and masks must have the recipe's size as they are stored."""
        return not self.resizes and bool(self.pictures or self.masks)

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

    def cut(self, fetched: Fetched, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The windows of decoded pictures, each uint8 (h, w, C), upright; black where they reach outside."""
        return self.upright(fetched, self._cut(fetched.windows, images, 0))

    def _cut(self, w: augment.Windows, images: Sequence[np.ndarray], outside: int) -> Sequence[np.ndarray]:
        if not self.crops:
            return images
        places = zip(images, w.x.tolist(), w.y.tolist(), w.w.tolist(), w.h.tolist(), strict=True)
        return [cut(*place, outside) for place in places]

    def upright(self, fetched: Fetched, windows: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Windows of stored pictures, turned where they are to be."""
        return _turned(windows, fetched.ways)

    def costs(self, samples: np.ndarray) -> np.ndarray:
        """Bytes that samples take while they are made: as they are stored, and their pixels."""
        m = self.manifest
        pixels = m.widths[samples].astype(np.int64) * m.heights[samples]
        cost = pixels * ((0 if self.raw else 3) * len(self.pictures) + len(self.masks))
        if IMAGE in self.pictures:
            cost += m.sizes[samples]
        for name in self.files:
            if name not in self.masks:
                cost += m.of_file(name, "bytes")[samples]
        return cost

    def batch(self, fetched: Fetched, pictures: torch.Tensor | None) -> Batch:
        """What the model and the loss get. pictures: of `fetched`, finished, in its order."""
        count = len(fetched.given.samples)
        made = {name: pictures[i * count : (i + 1) * count] for i, name in enumerate(self.pictures)} | fetched.values
        # masks travel in bytes to a loss (place.py); a model's bytes are pixels
        inputs = {name: made[name].long() if name in self.masks else made[name] for name in self.data.inputs}
        return Batch(one_or_all(inputs), one_or_all({n: made[n] for n in self.data.targets}), fetched.replaced)

    # ------------------------------------------------------------ fields that are no picture

    def _value(
        self, name: str, samples: np.ndarray, windows: augment.Windows, ways: np.ndarray | None, found: list[dict]
    ) -> Target:
        """A field of a batch: int64 for classes and whole numbers, float32 for others; masks and bytes uint8. What is
        read of files was found by sample."""
        kind = self.manifest.fields[name].kind
        if kind == "mask":
            return self._masks([read[name] for read in found], windows, ways)
        if kind == "boxes":
            return self._boxes(self.manifest.values(name)[samples], windows, ways)
        values = [read[name] for read in found] if kind in FILES else self.manifest.values(name)[samples]
        if name in self.data.encode:
            return self.encoders.encoded(name, samples, values)
        if kind == "bytes":
            return [torch.from_numpy(value.copy()) for value in values]  # what was read is read-only
        return torch.from_numpy(values.astype(np.float32 if values.dtype == np.float64 else np.int64))

    def _masks(self, stored: list[np.ndarray], windows: augment.Windows, ways: np.ndarray | None) -> torch.Tensor:
        """As the loss sees them, uint8 (B, S, S): cut, turned and mirrored as the images are."""
        size = self.data.image_size
        found = [m[:, :, 0] for m in _turned(self._cut(windows, [m[:, :, None] for m in stored], NOWHERE), ways)]
        found = [masks.resized(m, size, size) for m in found] if self.resizes else found
        pairs = zip(found, windows.flip.tolist(), strict=True)
        return torch.from_numpy(np.stack([m[:, ::-1] if flip else m for m, flip in pairs]))

    def _boxes(self, stored: list[np.ndarray], w: augment.Windows, ways: np.ndarray | None) -> list[torch.Tensor]:
        """Of each sample, float32 (n, 4 or more), in pixels of what the model sees."""
        size = (self.data.image_size, self.data.image_size)
        windows = np.stack([w.x, w.y, w.w, w.h], axis=1).tolist()
        turns = [1] * len(stored) if ways is None else ways.tolist()
        found = zip(stored, windows, turns, w.flip.tolist(), strict=True)
        made = (boxes.seen(mine, window, way, size, flip) for mine, window, way, flip in found)
        return [torch.from_numpy(one.astype(np.float32)) for one in made]


def _turned(windows: Sequence[np.ndarray], ways: np.ndarray | None) -> list[np.ndarray]:
    if ways is None:
        return list(windows)
    pairs = zip(windows, ways.tolist(), strict=True)
    return [np.ascontiguousarray(orientation.turned(window, way)) for window, way in pairs]

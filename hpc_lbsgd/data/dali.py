"""DALI as the loader: it is told which bytes to decode and which window to keep; it decides nothing.

On a GPU JPEGs are decoded by nvJPEG (`mixed`), resized and normalised there. Without one DALI only decodes, and torch
does the rest (finish.py); so it is on AMD's GPUs, which DALI does not know. Raw pixels skip the decoder.

Bytes go into the pipeline as they lie (`no_copy`): a batch of 256 photographs is 28 MB that the thread which trains
would copy. DALI reads them until as many batches as are prefetched have come out after it; so long they are kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, cycle, repeat, takewhile
from typing import Any

import numpy as np
import torch

from hpc_lbsgd.data import orientation
from hpc_lbsgd.data.ahead import ahead
from hpc_lbsgd.data.dali_check import reason, unturned
from hpc_lbsgd.data.decode import pixels
from hpc_lbsgd.data.finish import Finish
from hpc_lbsgd.data.place import on_device
from hpc_lbsgd.data.source import Batch, Fetched, Source
from hpc_lbsgd.data.storage import READERS, Request
from hpc_lbsgd.errors import RequestError, RunError

HW_DECODER_LOAD = 0.65  # fixed: the share of JPEGs that the GPU's decoder takes must not change between runs


class DaliLoader:
    """One pipeline for the whole run, of the largest batch; smaller batches pass through it as they are.

    whole: DALI does all, from bytes to normalised pixels (default: on GPUs).
    """

    def __init__(
        self,
        source: Source,
        max_batch: int,
        threads: int,
        prefetch: int,
        channels_last: bool,
        device: torch.device,
        whole: bool | None = None,
    ):
        self.source, self.prefetch, self.channels_last, self.device = source, prefetch, channels_last, device
        max_batch *= len(source.pictures)
        self.max_batch, self.threads, self.on_gpu = max_batch, threads, device.type == "cuda" and not torch.version.hip
        self.whole = self.on_gpu if whole is None else whole
        self._feed: Iterator[Fetched] = iter(())
        self._fed: deque[Fetched] = deque()  # in the pipeline, oldest first
        self._lent: deque[Any] = deque(maxlen=2 * prefetch + 2)  # what DALI may still read: those fed, and as many out
        if not self.whole:
            self._finish = Finish(source.data, source.resizes, channels_last, threads)
            # used in turn, one more than can be under way: fresh memory costs a page fault every 4 KB of each batch
            self._buffers = cycle([self._finish.empty(max_batch) for _ in range(prefetch + 2)])
        if self.whole or not source.raw:
            self._pipeline = self._build(max_batch, threads, self._next)

    # ------------------------------------------------------------ the pipeline

    def _build(self, max_batch: int, threads: int, source, prefetch: int | None = None):
        try:
            from nvidia.dali import Pipeline, fn, types
        except ImportError as problem:
            raise RequestError(
                f"data.loader = dali, but DALI does not load ({problem}); install "
                "nvidia-dali-cuda130, or set data.loader=torchvision"
            ) from None
        pipeline = Pipeline(
            batch_size=max_batch,
            num_threads=threads,
            prefetch_queue_depth=prefetch or self.prefetch,
            device_id=self.device.index or 0 if self.on_gpu else None,
        )
        window = {"axis_names": "WH", "normalized_anchor": False, "normalized_shape": False}
        decode = {
            "adjust_orientation": False,
            "output_type": types.GRAY if self.source.data.channels == 1 else types.RGB,
        }
        if self.on_gpu:
            # chroma upsampled as CPU decoders do: nvJPEG's own way is tens of levels off at edges of colour
            decode |= {"device": "mixed", "hw_decoder_load": HW_DECODER_LOAD, "jpeg_fancy_upsampling": True}
        asked = (4 if self.source.crops else 2) if self.whole else (3 if self.source.resizes else 1)
        with pipeline:
            inputs = fn.external_source(source=source, batch=True, num_outputs=asked, no_copy=True)
            if self.whole:
                images = self._whole(fn, types, inputs, window, decode)
            elif self.source.resizes:  # only the window is decoded, where the format allows it
                images = fn.decoders.image_slice(*inputs, **window, **decode)
            else:
                images = fn.decoders.image(*inputs, **decode)
            pipeline.set_outputs(images)
        pipeline.build()
        return pipeline

    def _whole(self, fn, types, inputs, window: dict, decode: dict):
        """The graph from bytes to normalised pixels."""
        data, (encoded, flip, *place) = self.source.data, inputs
        if self.source.raw:
            images = fn.reshape(encoded, layout="HWC")
            if self.source.resizes:
                images = fn.slice(images, *place, **window)  # on the CPU: only the window travels
            images = images.gpu() if self.on_gpu else images
        elif self.source.resizes:
            images = fn.decoders.image_slice(encoded, *place, **window, **decode)
        else:
            images = fn.decoders.image(encoded, **decode)
        if self.source.resizes:
            images = fn.resize(
                images,
                size=[data.image_size] * 2,
                interp_type=types.INTERP_LINEAR,
                antialias=True,
                dtype=types.FLOAT,
            )
        elif self.source.crops:
            images = fn.slice(images, *place, **window, out_of_bounds_policy="pad")
        layout = "HWC" if self.channels_last else "CHW"
        return fn.crop_mirror_normalize(
            images, mirror=flip, mean=data.mean, std=data.std, output_layout=layout, dtype=types.FLOAT
        )

    def _next(self):
        """What DALI asks for, ahead of time: bytes, windows and flips of the next request."""
        fetched = next(self._feed)  # StopIteration ends the pipeline's epoch
        self._fed.append(fetched)
        self._lent.append(self._inputs(fetched))
        return self._lent[-1]

    def _inputs(self, fetched: Fetched):
        w = fetched.windows
        mirror = w.flip & ~self._turned_later(fetched)
        flip = [mirror.astype(np.int32)[:, None]] if self.whole else []
        asked_for = self.source.crops if self.whole else self.source.resizes
        corner_and_size = ((w.x, w.y), (w.w, w.h)) if asked_for else ()
        contents = fetched.contents if self.source.raw else [unturned(content) for content in fetched.contents]
        return contents, *flip, *(np.stack(pair, axis=1).astype(np.int32) for pair in corner_and_size)

    def _outputs(self) -> Iterator[tuple[Fetched, Any]]:
        """What the pipeline makes of the feed, in order; on a GPU bound to the stream that asks: what is launched there
        waits for it, this thread does not."""
        while True:
            try:
                (output,) = self._pipeline.run(torch.cuda.current_stream(self.device) if self.on_gpu else None)
            except StopIteration:
                self._pipeline.reset()
                return
            except RuntimeError as problem:
                self._find_bad(problem)
                # what was under way is asked for again, with stand-ins; the broken pipeline is left behind
                again = [f.asked for f in self._fed]
                self._fed.clear()
                self._feed = chain(map(self.source.fetch, again), self._feed)
                self._pipeline = self._build(self.max_batch, self.threads, self._next)
                continue
            yield self._fed.popleft(), output

    # ------------------------------------------------------------ batches

    def batches(self, requests: Iterable[Request]) -> Iterator[Batch]:
        self._feed = ahead(self.source.fetch, requests, self.prefetch, READERS)
        made = map(self._as_torch, self._outputs()) if self.whole else self._finished()
        for fetched, images in made:
            # a wait where memory is used again: of a GPU that DALI does not know
            yield on_device(self.source.batch(fetched, images.to(self.device)), self.device)

    def decoded(self, requests: Iterable[Request]) -> Iterator[tuple[Fetched, Any]]:
        """Of each request what DALI makes of it, and no more: the fastest that batches can be on a CPU."""
        self._feed = ahead(self.source.fetch, requests, self.prefetch, READERS)
        return self._outputs()

    def _finished(self) -> Iterator[tuple[Fetched, torch.Tensor]]:
        """On a CPU: decoded windows, resized and normalised ahead of time in one more thread."""
        decoded = self._windows()

        def make(_) -> tuple[Fetched, torch.Tensor] | None:
            fetched, windows = next(decoded, (None, None))
            if fetched is None:
                return None
            room = next(self._buffers)[: len(windows)]
            return fetched, self._finish.into(room, windows, fetched.windows.flip)

        return takewhile(lambda made: made is not None, ahead(make, repeat(None), self.prefetch, 1))

    def _windows(self) -> Iterator[tuple[Fetched, list[np.ndarray]]]:
        """The windows of each request, decoded; good until the next are asked for."""
        if self.source.raw:
            for fetched in self._feed:
                yield fetched, self.source.cut(fetched, fetched.contents)
            return
        for fetched, output in self._outputs():
            images = np.asarray(output.as_tensor()) if output.is_dense_tensor() else map(np.asarray, output)
            made = self.source.upright if self.source.resizes else self.source.cut
            yield fetched, made(fetched, list(images))

    def _as_torch(self, made: tuple[Fetched, Any]) -> tuple[Fetched, torch.Tensor]:
        """Where DALI does all: the pipeline's output as it lies. It is ours for as long as it is held, for DALI takes
        fresh memory for each (`exec_dynamic`, its default); what is freed is freed in the order of its stream."""
        fetched, output = made
        images = torch.from_dlpack(output.as_tensor())
        images = images.permute(0, 3, 1, 2) if self.channels_last else images
        for i in np.flatnonzero(self._turned_later(fetched)):
            images[i] = orientation.upright_tensor(images[i], int(fetched.ways[i]), fetched.windows.flip[i])
        return fetched, images

    def _turned_later(self, fetched: Fetched) -> np.ndarray:
        """Where DALI does all: pictures (B,) that are turned, and then mirrored, when they are square: DALI cannot turn
        one of a batch and leave another."""
        if not self.whole or fetched.ways is None:
            return np.zeros(len(fetched.contents), bool)
        return fetched.ways > 1

    def _find_bad(self, problem: RuntimeError) -> None:
        """DALI does not say which image it failed at. Most that fail it fail Pillow, which is asked in no time; what is
        left is passed through a pipeline one by one."""
        candidates = [(fetched, number) for fetched in self._fed for number in range(len(fetched.contents))]
        for why in (self._pillow, self._probe()):
            found = False
            for fetched, number in candidates:
                told = why(fetched, number)
                if told:
                    found = True
                    self.source.refuse(self.source.undecodable(fetched, number, told))
            if found:
                return
        raise RunError(f"DALI failed: {problem}") from problem

    def _pillow(self, fetched: Fetched, number: int) -> str | None:
        if not self.source.raw:
            try:
                pixels(fetched.contents[number], self.source.data.channels)
            except ValueError as problem:
                return f"Pillow: {problem}"
        return None

    def _probe(self) -> Callable[[Fetched, int], str | None]:
        """Why a pipeline of one image cannot decode it. It serves until it fails, which breaks it."""
        pipeline, given = None, []

        def why(fetched: Fetched, number: int) -> str | None:
            nonlocal pipeline
            given[:] = [self._inputs(fetched.picture(number))]
            pipeline = pipeline or self._build(1, 1, lambda: given[0], prefetch=1)
            try:
                pipeline.run()
            except RuntimeError as own:
                pipeline = None
                return f"DALI: {reason(own)}"
            return None

        return why

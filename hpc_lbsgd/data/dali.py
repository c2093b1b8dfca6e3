"""DALI as the loader: it is told which bytes to decode and which window to keep; it decides nothing.

On a GPU JPEGs are decoded by nvJPEG (`mixed`) and resized there; without one everything runs on the CPU. Raw pixels
skip the decoder.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain, repeat

import numpy as np
import torch

from hpc_lbsgd.data.ahead import ahead
from hpc_lbsgd.data.loader import Batch, Fetched, Source
from hpc_lbsgd.data.manifest import decode
from hpc_lbsgd.data.storage import READERS, Request, SampleError
from hpc_lbsgd.errors import RequestError, RunError

HW_DECODER_LOAD = 0.65  # fixed: the share of JPEGs that the GPU's decoder takes must not change between runs


class DaliLoader:
    """One pipeline for the whole run, of the largest batch; smaller batches pass through it as they are."""

    def __init__(
        self, source: Source, max_batch: int, threads: int, prefetch: int, channels_last: bool, device: torch.device
    ):
        self.source, self.prefetch, self.channels_last, self.device = source, prefetch, channels_last, device
        self.max_batch, self.threads = max_batch, threads
        self._feed: Iterator = iter(())
        self._fed: deque[Fetched] = deque()  # in the pipeline, oldest first
        self._pipeline = self._build(max_batch, threads, self._next)

    def _build(self, max_batch: int, threads: int, source):
        try:
            from nvidia.dali import Pipeline, fn, types
        except ImportError as problem:
            raise RequestError(
                f"data.loader = dali, but DALI does not load ({problem}); install "
                "nvidia-dali-cuda130, or set data.loader=torchvision"
            ) from None
        data, on_gpu = self.source.data, self.device.type == "cuda"
        pipeline = Pipeline(
            batch_size=max_batch,
            num_threads=threads,
            prefetch_queue_depth=self.prefetch,
            device_id=self.device.index or 0 if on_gpu else None,
        )
        with pipeline:
            encoded, flip, *place = fn.external_source(
                source=source, batch=True, num_outputs=4 if self.source.crops else 2
            )
            if self.source.raw:
                encoded = fn.reshape(encoded, layout="HWC")
            decode = {
                "device": "mixed" if on_gpu else "cpu",
                "adjust_orientation": False,
                "output_type": types.GRAY if data.channels == 1 else types.RGB,
            }
            if on_gpu:
                decode["hw_decoder_load"] = HW_DECODER_LOAD
            window = {"axis_names": "WH", "normalized_anchor": False, "normalized_shape": False}
            if self.source.resizes:
                if self.source.raw:
                    images = fn.slice(encoded, *place, **window)  # on the CPU: only the window travels
                    images = images.gpu() if on_gpu else images
                else:  # only the window is decoded, where the format allows it
                    images = fn.decoders.image_slice(encoded, *place, **window, **decode)
                images = fn.resize(
                    images,
                    size=[data.image_size] * 2,
                    interp_type=types.INTERP_LINEAR,
                    antialias=True,
                    dtype=types.FLOAT,
                )
            else:
                if self.source.raw:
                    images = encoded.gpu() if on_gpu else encoded
                else:
                    images = fn.decoders.image(encoded, **decode)
                if self.source.crops:
                    images = fn.slice(images, *place, **window, out_of_bounds_policy="pad")
            layout = "HWC" if self.channels_last else "CHW"
            images = fn.crop_mirror_normalize(
                images, mirror=flip, mean=data.mean, std=data.std, output_layout=layout, dtype=types.FLOAT
            )
            pipeline.set_outputs(images)
        pipeline.build()
        return pipeline

    def _next(self):
        """What DALI asks for, ahead of time: bytes, windows and flips of the next request."""
        fetched = next(self._feed)  # StopIteration ends the pipeline's epoch
        self._fed.append(fetched)
        return self._inputs(fetched)

    def _inputs(self, fetched: Fetched):
        w = self.source.windows(fetched.given)
        flip = w.flip.astype(np.int32)[:, None]
        if not self.source.crops:
            return fetched.contents, flip
        return fetched.contents, flip, *(np.stack(pair, axis=1).astype(np.int32) for pair in ((w.x, w.y), (w.w, w.h)))

    def batches(self, requests: Iterable[Request]) -> Iterator[Batch]:
        from nvidia.dali.plugin.pytorch import feed_ndarray

        data = self.source.data
        self._feed = ahead(self.source.fetch, requests, self.prefetch, READERS)
        while True:
            try:
                (output,) = self._pipeline.run()
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
            fetched = self._fed.popleft()
            request = fetched.given
            shape = (len(request.samples), data.channels, data.image_size, data.image_size)
            images = torch.empty(
                shape,
                device=self.device,
                memory_format=torch.channels_last if self.channels_last else torch.contiguous_format,
            )
            # DALI reuses its buffers: copy. Seen as NHWC, a channels-last tensor is contiguous.
            target = images.permute(0, 2, 3, 1) if self.channels_last else images
            stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
            feed_ndarray(output.as_tensor(), target, cuda_stream=stream)
            labels = torch.from_numpy(self.source.labels(request))
            yield Batch(images, labels.to(self.device, non_blocking=True), fetched.replaced)

    def _find_bad(self, problem: RuntimeError) -> None:
        """DALI does not say which image it failed at: pass the candidates through a pipeline one by one."""
        found = False
        for fetched in self._fed:
            for sample, content in zip(fetched.given.samples.tolist(), fetched.contents, strict=True):
                one = Fetched(fetched.asked, Request(fetched.asked.epoch, np.array([sample])), [content])
                probe = self._build(1, 1, repeat(self._inputs(one)))
                try:
                    probe.run()
                except RuntimeError as own:
                    found = True
                    self.source.refuse(SampleError(sample, self._describe(sample, own)))
        if not found:
            raise RunError(f"DALI failed: {problem}") from problem

    def _describe(self, sample: int, problem: RuntimeError) -> str:
        try:
            decode(self.source.storage.read(sample).tobytes())
            reason = str(problem).strip().splitlines()[0]
        except ValueError as found:  # Pillow's words are plainer
            reason = str(found)
        return (
            f"{self.source.manifest.file(sample)}: cannot be decoded ({reason}); it changed since it was indexed. Mend "
            "it, or have it left out (hpc-lbsgd data verify), and index again"
        )

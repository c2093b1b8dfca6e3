"""DALI as the loader: it is told which bytes to decode and which window to keep; it decides nothing.

On a GPU JPEGs are decoded by nvJPEG (`mixed`) and resized there; without one everything runs on the CPU.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from hpc_lbsgd.data.loader import Batch, Source
from hpc_lbsgd.data.storage import Request, read_ahead
from hpc_lbsgd.errors import RequestError, RunError

HW_DECODER_LOAD = 0.65  # fixed: the share of JPEGs that the GPU's decoder takes must not change between runs


class DaliLoader:
    """One pipeline for the whole run, of the largest batch; smaller batches pass through it as they are."""

    def __init__(
        self, source: Source, max_batch: int, threads: int, prefetch: int, channels_last: bool, device: torch.device
    ):
        self.source, self.prefetch, self.channels_last, self.device = source, prefetch, channels_last, device
        self._feed: Iterator = iter(())
        self._fed: deque[Request] = deque()
        self._pipeline = self._build(max_batch, threads)

    def _build(self, max_batch: int, threads: int):
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
                source=self._next, batch=True, num_outputs=4 if self.source.crops else 2
            )
            decode = {
                "device": "mixed" if on_gpu else "cpu",
                "adjust_orientation": False,
                "output_type": types.GRAY if data.channels == 1 else types.RGB,
            }
            if on_gpu:
                decode["hw_decoder_load"] = HW_DECODER_LOAD
            window = {"axis_names": "WH", "normalized_anchor": False, "normalized_shape": False}
            if self.source.resizes:
                # only the window is decoded, where the format allows it
                images = fn.decoders.image_slice(encoded, *place, **window, **decode)
                images = fn.resize(
                    images,
                    size=[data.image_size] * 2,
                    interp_type=types.INTERP_LINEAR,
                    antialias=True,
                    dtype=types.FLOAT,
                )
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
        request, encoded = next(self._feed)  # StopIteration ends the pipeline's epoch
        self._fed.append(request)
        w = self.source.windows(request)
        flip = w.flip.astype(np.int32)[:, None]
        if not self.source.crops:
            return encoded, flip
        return encoded, flip, *(np.stack(pair, axis=1).astype(np.int32) for pair in ((w.x, w.y), (w.w, w.h)))

    def batches(self, requests: Iterable[Request]) -> Iterator[Batch]:
        from nvidia.dali.plugin.pytorch import feed_ndarray

        data = self.source.data
        self._feed = read_ahead(self.source.storage, requests, depth=self.prefetch)
        while True:
            try:
                (output,) = self._pipeline.run()
            except StopIteration:
                self._pipeline.reset()
                return
            except RuntimeError as problem:
                raise self._bad_image(problem) from problem
            request = self._fed.popleft()
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
            yield images, labels.to(self.device, non_blocking=True)

    def _bad_image(self, problem: RuntimeError) -> RunError:
        """DALI does not say which image it failed at: decode the candidates one by one."""
        from hpc_lbsgd.data.manifest import examine

        for request in self._fed:
            names = [self.source.storage.name(i) for i in request.samples]
            for name, result in zip(names, examine("", names), strict=True):
                if isinstance(result, str):
                    return RunError(
                        f"{name}: cannot be decoded ({result}); it changed since it was indexed. Mend it or "
                        "remove it and index again"
                    )
        return RunError(f"DALI failed: {problem}")

"""What a checkpoint will hold, as it is between two steps: a copy in host memory that no later step changes."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

from hpc_lbsgd.train.replica import Replica


@dataclass
class Snapshot:
    """tensors: by part ("weights", "optimizer", "average") and name; those of "optimizer" are by kind, then name, or as
    its state dict has them. They may be read once `wait` has returned. state: a `checkpoint.State` of its own."""

    state: Any
    tensors: dict[str, dict]
    copied: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Until what a GPU copies has arrived. Any thread may call it."""
        if self.copied is not None:
            self.copied.synchronize()


class HostCopy:
    """Memory for one snapshot, used again by each: it holds as many bytes as a checkpoint, and pages are not made anew.

    A snapshot is valid until the next one is taken.
    """

    def __init__(self):
        self._held: dict[tuple[str, ...], torch.Tensor] = {}
        self._stream: torch.cuda.Stream | None = None

    @torch.no_grad()
    def take(self, replica: Replica, state) -> Snapshot:
        """Copy all that decides the next step. On a GPU the copies go to pinned memory on a stream of their own, behind
        all work queued so far; work queued later waits for them, this thread does not."""
        parts: dict[str, dict] = {
            "weights": replica.model.state_dict(),
            "optimizer": replica.optimizer.state(),
        }
        if replica.average:
            parts["average"] = replica.averaged()
        snapshot = Snapshot(copy.deepcopy(state), {})
        if replica.device.type == "cuda":
            now = torch.cuda.current_stream(replica.device)
            self._stream = self._stream or torch.cuda.Stream(replica.device)
            self._stream.wait_stream(now)
            with torch.cuda.stream(self._stream):
                snapshot.tensors = self._copied(parts, ())
                snapshot.copied = self._stream.record_event()
            now.wait_event(snapshot.copied)  # the next update writes where the copy reads
        else:
            snapshot.tensors = self._copied(parts, ())
        if replica.average:
            snapshot.tensors["average"] = snapshot.tensors["weights"] | snapshot.tensors["average"]
        return snapshot

    def _copied(self, value, place: tuple[str, ...]):
        if isinstance(value, dict):
            return {name: self._copied(inner, (*place, str(name))) for name, inner in value.items()}
        if isinstance(value, (list, tuple)):
            inside = [self._copied(inner, (*place, str(i))) for i, inner in enumerate(value)]
            return inside if isinstance(value, list) else tuple(inside)
        if not isinstance(value, torch.Tensor):
            return copy.deepcopy(value)
        held = self._held.get(place)
        if held is None or (held.shape, held.dtype) != (value.shape, value.dtype):
            held = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
            self._held[place] = held
        return held.copy_(value, non_blocking=True)

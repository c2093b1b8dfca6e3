"""BatchNorm's running means and variances: what a step measured, over all ranks, and one moving average from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch

from hpc_lbsgd.parallel.layout import aligned
from hpc_lbsgd.train.workers import Slot, VirtualNorm


class Turn(NamedTuple):
    """The slots of one call of all layers that have it."""

    values: slice  # of the sums
    rows: torch.Tensor  # int64, where each value belongs in the flat buffer
    slots: torch.Tensor  # int64, which slot's count each value has
    members: torch.Tensor  # int64, layers by slot


class Table(NamedTuple):
    """What a pass measures, a row a BatchNorm group."""

    rows: torch.Tensor  # (G, elements before the counts)
    slots: list[list[Slot]]  # views, by layer and call


class RunningStatistics:
    """Running means and variances as views into one flat buffer, beside a buffer for what a step measures.

    layers   BatchNorm layers with running statistics
    calls    how often each is called in a forward, by name (1 where it is not said)

    Each call of a layer in a forward has its own slot. What is summed over groups and ranks (`size` elements, in the
    first bucket of gradients) is laid out as: first calls of all layers, as in the flat buffer; second calls of those
    that have one; and so on; at the end, how many groups measured each slot. Sums and counts are in units of
    2^-ceil(log2(groups of the step)), which keeps them small, and exact.
    """

    def __init__(self, layers: list[VirtualNorm], calls: Mapping[str, int], dtype: torch.dtype, device: torch.device):
        self.layers = layers
        offset, offsets = 0, []
        for layer in layers:
            offsets.append(offset)
            offset = aligned(offset + 2 * layer.module.num_features, dtype.itemsize)
        self.flat = torch.zeros(offset, dtype=dtype, device=device)
        self.momentum = torch.zeros_like(self.flat)
        self.batches = torch.zeros(len(layers), dtype=torch.int64, device=device)
        self._views: dict[str, tuple[int, int]] = {}  # where a buffer lies in `flat`, by its name in the state dict
        for i, (layer, start) in enumerate(zip(layers, offsets, strict=True)):
            self._adopt(i, layer, start)

        # Slots: (call, layer), those of one call side by side.
        own_calls = [max(1, calls.get(layer.name, 1)) for layer in layers]
        self.slots: list[tuple[int, int]] = []
        self.turns: list[Turn] = []
        self._starts: list[int] = []  # of each slot
        at = 0
        for call in range(max(own_calls, default=0)):
            members = [i for i, count in enumerate(own_calls) if call < count]
            self.slots += [(call, i) for i in members]
            first, rows, slots = at, [], []
            for i in members:
                room = aligned(2 * layers[i].module.num_features, dtype.itemsize)
                slots += [len(self._starts)] * room
                rows += range(offsets[i], offsets[i] + room)
                self._starts.append(at)
                at += room
            self.turns.append(Turn(slice(first, at), *(torch.tensor(v, device=device) for v in (rows, slots, members))))
        self.values = at  # elements before the counts
        self.size = aligned(at + len(self.slots), dtype.itemsize)
        self._tables: dict[int, Table] = {}  # by number of groups: what compiled layers see has one shape for each
        self._rows: torch.Tensor | None = None  # of the pass under way

    def _adopt(self, i: int, layer: VirtualNorm, start: int) -> None:
        """Make a layer's buffers views."""
        module, width = layer.module, layer.module.num_features
        view = self.flat[start : start + 2 * width].view(2, -1)
        view[0], view[1] = module.running_mean, module.running_var
        module.running_mean, module.running_var = view[0], view[1]
        self.momentum[start : start + 2 * width] = module.momentum
        prefix = f"{layer.name}." if layer.name else ""
        self._views[f"{prefix}running_mean"] = (start, start + width)
        self._views[f"{prefix}running_var"] = (start + width, start + 2 * width)
        if module.num_batches_tracked is not None:
            self.batches[i] = module.num_batches_tracked
            module.num_batches_tracked = self.batches[i]

    def named(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """A buffer laid out as `flat`, by names of the state dict, as views."""
        return {name: flat[start:stop] for name, (start, stop) in self._views.items()}

    # ---------------------------------------------------------------- a pass

    def begin_pass(self, groups: int) -> None:
        """Make room for what the layers measure in a pass of so many BatchNorm groups."""
        if groups not in self._tables:
            self._tables[groups] = self._table(groups)
        self._rows, slots = self._tables[groups]
        self._rows.zero_()  # else a NaN would stay: batch_norm adds to 0 times what is there
        for layer, own in zip(self.layers, slots, strict=True):
            layer.slots, layer.measured = own, [0] * len(own)

    def _table(self, groups: int) -> Table:
        table = Table(self.flat.new_zeros(groups, self.values), [[] for _ in self.layers])
        for (_, i), start in zip(self.slots, self._starts, strict=True):
            width = self.layers[i].module.num_features
            both = table.rows[:, start : start + 2 * width]
            # .data: versions of their own. A compiled layer saves its buffers for backward, and writing those of the
            # next layer would count as a change of them.
            table.slots[i].append(Slot(both.data, [(row[:width].data, row[width:].data) for row in both]))
        return table

    def end_forward(self, sums: torch.Tensor, groups: int, groups_in_step: int) -> None:
        """Add what a pass measured to `sums`, a buffer of `size` elements."""
        unit = 2.0 ** -math.ceil(math.log2(groups_in_step))
        for measured in self._rows:
            sums[: self.values].add_(measured, alpha=unit)
        counts = [self.layers[i].measured[call] for call, i in self.slots]
        if all(count == groups for count in counts):
            sums[self.values : self.values + len(counts)].add_(groups * unit)
        else:
            counted = torch.tensor(counts, dtype=sums.dtype, device=sums.device)
            sums[self.values : self.values + len(counts)].add_(counted, alpha=unit)

    # ---------------------------------------------------------------- a step

    def update(self, sums: torch.Tensor, share: float = 1.0, ok: torch.Tensor | None = None) -> None:
        """running <- (1 - m) * running + m * (mean over the groups that measured), a call after the other; a slot that
        nothing measured changes nothing. sums: over all ranks. share: B'/kn of a tail, where m is 1 - (1 - m)^share.
        ok: as for `Optimizer.step`.
        """
        momentum = self.momentum if share == 1 else 1 - (1 - self.momentum) ** share
        counts = sums[self.values : self.values + len(self.slots)]
        first = 0
        for values, rows, slots, members in self.turns:
            count = counts[slots]
            measured = count > 0
            mean = sums[values] / count.where(measured, 1)
            # the first calls of all layers lie as in `flat`
            before = self.flat if first == 0 else self.flat[rows]
            after = before.lerp(mean, momentum[rows] * measured)
            seen = counts[first : first + len(members)] > 0
            if ok is not None:
                after, seen = torch.where(ok, after, before), seen & ok
            if first == 0:
                self.flat.copy_(after)
            else:
                self.flat[rows] = after
            self.batches[members] += seen
            first += len(members)

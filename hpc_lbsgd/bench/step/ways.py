"""The ways to train that `bench step` compares, each with one step and one step in parts. All do the same work."""

from __future__ import annotations

import time
from contextlib import nullcontext
from itertools import repeat

import torch
import torch.nn.functional as F
from torch import nn

from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.bench.core.pictures import noise
from hpc_lbsgd.bench.core.task import CLASSES, DECAY, LR, MOMENTUM, PARTS, recipe_of
from hpc_lbsgd.data.source import Batch
from hpc_lbsgd.train import models
from hpc_lbsgd.train.replica import channels_last_is_safe


class Clock:
    """Seconds between calls, by part. On a GPU it waits for what was computed, not for sums that go on beside it."""

    def __init__(self, device: torch.device):
        self.device, self.parts = device, dict.fromkeys(PARTS, 0.0)

    def start(self) -> None:
        self.wait()
        self.last = time.perf_counter()

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def lap(self, part: str) -> None:
        self.wait()
        now = time.perf_counter()
        self.parts[part] += now - self.last
        self.last = now


# ---------------------------------------------------------------- the ways to train


class Ours:
    """The trainer's own step on an engine of the toolkit."""

    def __init__(self, task: dict, device: torch.device):
        from hpc_lbsgd.parallel import engine
        from hpc_lbsgd.parallel.memory import keep_freed_memory

        keep_freed_memory()  # as `train` does; the peers are as their own users start them
        self.task, self.device = task, device
        first = recipe_of(task, 1, task["batches"][0])
        self.engine = engine.create(first.machine, first.determinism, device)
        self.rank, self.size = self.engine.rank, self.engine.size

    def prepare(self, batch: int) -> None:
        from hpc_lbsgd.theory.schedule import Point
        from hpc_lbsgd.train.replica import Replica
        from hpc_lbsgd.train.step import Stepper

        recipe = recipe_of(self.task, self.size, batch)
        self.replica = Replica(recipe, CLASSES, self.engine, self.device)
        self.replica.synchronise()
        pictures = synthetic(self.task, batch, self.device, self.replica.channels_last)
        kn = batch * self.size
        self.point = Point(0, 0, 0, LR, MOMENTUM, self.size, batch, 0, kn)
        self.stepper = Stepper(self.replica, recipe, repeat(pictures))
        self.outcomes = self.stepper.outcomes(repeat(self.point))
        self.loss, self.mark, self.update = self.stepper.loss, self.stepper.mark, self.replica.update

    def step(self) -> None:
        next(self.outcomes)

    def step_in_parts(self, clock: Clock) -> None:
        """Between the trainer's own marks: forward ends with the loss, backward where it starts to wait for sums.
        Whole steps are over."""
        self.stepper.drop()

        def loss(*args):
            found = self.loss(*args)
            clock.lap("forward_s")
            return found

        def mark(phase, step):
            if phase == "sum":
                clock.lap("backward_s")

        def update(*args):
            clock.lap("exposed_comm_s")
            self.update(*args)
            clock.lap("optimizer_s")

        self.stepper.loss, self.stepper.mark, self.replica.update = loss, mark, update
        clock.start()
        self.stepper.run(self.point)
        self.stepper.loss, self.stepper.mark, self.replica.update = self.loss, self.mark, self.update

    def slowest(self, value: float) -> float:
        return max(self.engine.gather(value))

    def barrier(self) -> None:
        self.engine.barrier()

    def close(self) -> None:
        self.engine.close()


class Peer:
    """A plain PyTorch loop: the same model, pictures and threads, torch's SGD, and a peer's own class around them."""

    rank, size = 0, 1
    gradients_must_be_plain = False  # Horovod refuses gradients that are channels last

    def __init__(self, task: dict, device: torch.device):
        self.task, self.device = task, device

    def prepare(self, batch: int) -> None:
        section = recipe_of(self.task, self.size, batch).model
        model = models.build(section, 3, CLASSES, 0)
        channels_last = self.device.type != "cpu" or channels_last_is_safe(model)
        weights_too = channels_last and not self.gradients_must_be_plain
        layout = torch.channels_last if weights_too else torch.contiguous_format
        self.model = model.to(self.device, memory_format=layout)
        decayed = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() <= 1]
        self.optimizer = torch.optim.SGD(
            [{"params": decayed, "weight_decay": DECAY}, {"params": others}], lr=LR, momentum=MOMENTUM, nesterov=True
        )
        self.images, self.labels, _ = synthetic(self.task, batch, self.device, channels_last)
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.task["precision"] == "bf16")
        self.wrap()

    def wrap(self) -> None:
        pass

    def loss(self) -> torch.Tensor:
        with self.autocast:
            outputs = self.model(self.images)
        return F.cross_entropy(outputs.float(), self.labels)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()

    def step_in_parts(self, clock: Clock) -> None:
        clock.start()
        self.optimizer.zero_grad()
        loss = self.loss()
        clock.lap("forward_s")
        loss.backward()
        clock.lap("backward_s")
        with self.synchronised(clock):
            self.optimizer.step()
        clock.lap("optimizer_s")

    def synchronised(self, clock: Clock):
        return nullcontext()

    def slowest(self, value: float) -> float:
        return value

    def barrier(self) -> None:
        pass

    def close(self) -> None:
        pass


class Horovod(Peer):
    """hvd.DistributedOptimizer as its examples use it."""

    gradients_must_be_plain = True

    def __init__(self, task: dict, device: torch.device):
        super().__init__(task, device)
        import horovod.torch as hvd

        hvd.init()
        self.hvd, self.rank, self.size = hvd, hvd.rank(), hvd.size()

    def wrap(self) -> None:
        self.hvd.broadcast_parameters(self.model.state_dict(), root_rank=0)
        self.optimizer = self.hvd.DistributedOptimizer(self.optimizer, named_parameters=self.model.named_parameters())

    def synchronised(self, clock: Clock):
        self.optimizer.synchronize()
        clock.lap("exposed_comm_s")
        return self.optimizer.skip_synchronize()

    def slowest(self, value: float) -> float:
        return max(self.hvd.allgather_object(value))

    def barrier(self) -> None:
        self.hvd.barrier()

    def close(self) -> None:
        self.hvd.shutdown()


class Ddp(Peer):
    """DistributedDataParallel as shipped. What of its backward is communication shows only against a backward
    without, inside no_sync(): a step in parts is one of each."""

    def __init__(self, task: dict, device: torch.device):
        super().__init__(task, device)
        from hpc_lbsgd.parallel.ddp_engine import DdpEngine

        self.engine = DdpEngine(recipes.Machine(engine="ddp"), "off", device)  # for its way to meet
        self.rank, self.size = self.engine.rank, self.engine.size

    def wrap(self) -> None:
        self.model = nn.parallel.DistributedDataParallel(self.model)

    def step_in_parts(self, clock: Clock) -> None:
        alone = Clock(self.device)
        with self.model.no_sync():
            super().step_in_parts(alone)
        together = Clock(self.device)
        super().step_in_parts(together)
        for part in ("forward_s", "optimizer_s"):
            clock.parts[part] += together.parts[part]
        exposed = max(0.0, together.parts["backward_s"] - alone.parts["backward_s"])
        clock.parts["exposed_comm_s"] += exposed
        clock.parts["backward_s"] += together.parts["backward_s"] - exposed

    def slowest(self, value: float) -> float:
        return max(self.engine.gather(value))

    def barrier(self) -> None:
        self.engine.barrier()

    def close(self) -> None:
        self.engine.close()


def synthetic(task: dict, batch: int, device: torch.device, channels_last: bool) -> Batch:
    """The same pictures for every way, rank and launch."""
    generator = torch.Generator().manual_seed(0)
    return noise(generator, batch, 3, task["image_size"], CLASSES, channels_last, device)


ENGINES = {"hpc_lbsgd": Ours, "horovod-stock": Horovod, "horovod-tuned": Horovod, "ddp": Ddp, "none": Peer}

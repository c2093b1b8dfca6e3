"""torch.distributed's DistributedDataParallel itself: the peer we measure against, and a choice for users.

DDP sums gradients in its own buckets during backward and hands them back in place, so that the optimizer, BatchNorm's
statistics, the control vector and checkpoints are the same code as elsewhere.
"""

from __future__ import annotations

from torch import nn

from hpc_lbsgd.parallel.torch_engine import TorchEngine


class DdpEngine(TorchEngine):
    name = "ddp"
    sums_gradients = True

    def wrap(self, model: nn.Module, bucket_mb: float) -> nn.Module:
        # running statistics are equal on all ranks already: there are no buffers to broadcast
        return nn.parallel.DistributedDataParallel(model, bucket_cap_mb=bucket_mb, broadcast_buffers=False)

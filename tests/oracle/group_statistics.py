"""BatchNorm on groups of samples, as torch's own kernel computes it: beside the plain loop, and as plain."""

from collections import Counter, defaultdict

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


class Statistics(TorchFunctionMode):
    """What the groups of a step measure in each call of each BatchNorm: torch's kernel is given empty running
    statistics and momentum 1, and the layer's own are updated once a step."""

    def __init__(self):
        super().__init__()
        self.measured = defaultdict(list)  # by number of the call and layer: what each group measured, and where to

    def __enter__(self):
        self.calls = Counter()  # each group is one forward
        return super().__enter__()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        function = self.batch_norm if function is F.batch_norm else function
        return function(*args, **(kwargs or {}))

    def batch_norm(self, x, mean, variance, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
        if not training:
            return F.batch_norm(x, mean, variance, weight, bias, False, momentum, eps)
        own = torch.zeros(2, x.shape[1], dtype=x.dtype)
        y = torch.batch_norm(x, weight, bias, *own, True, 1.0, eps, False)
        if mean is not None:
            if x.numel() > x.shape[1]:  # one value a channel becomes zero, and measures no variance
                self.measured[self.calls[id(mean)], id(mean)].append((own, mean, variance, momentum))
            self.calls[id(mean)] += 1
        return y

    def update(self, full):
        for _, groups in sorted(self.measured.items()):
            own, (mean, *_), (variance, *_), (momentum, *_) = zip(*groups, strict=True)
            for running, new in zip((mean, variance), torch.stack(own).mean(0), strict=True):
                running.lerp_(new, 1 - (1 - momentum) ** full)

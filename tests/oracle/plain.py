"""What a recipe means, as a plain PyTorch loop: one process, float64, the user's own modules, torch's own kernels.

It shares one thing with the product: the order of samples. Everything else is written a second time from DESIGN.md
("Semantics, pinned") and the papers, so that both are wrong together only where both misread the same sentence.
"""

import math

import torch
import torch.nn.functional as F
from group_statistics import Statistics

from hpc_lbsgd.data.order import Permutation


def train(recipe, model, data):
    """Train `model` for train.max_steps steps; returns its state and the moving average of its state."""
    model, inputs, labels = model.double(), *(torch.stack([torch.as_tensor(s[i]) for s in data]) for i in (0, 1))
    batch, optim, d = recipe["batch"], recipe["optim"], recipe["train"]["ema_decay"]
    kn = batch["workers"] * batch["samples_per_worker"]
    steps_per_epoch = math.ceil(len(data) / kn)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(parameters, optim)
    average = state(model)
    for step in range(recipe["train"]["max_steps"]):
        epoch, i = divmod(step, steps_per_epoch)
        order = torch.from_numpy(Permutation(len(data), recipe["seed"], epoch)[i * kn : (i + 1) * kn])
        full = len(order) / kn  # below 1 in a tail: a full step whose absent samples are zeros
        for p in parameters:
            p.grad = torch.zeros_like(p)  # what no group uses has a gradient of zero, and still decays
        model.train()
        statistics = Statistics()
        for group in order.split(batch["bn_group"]):  # divides n: this cuts every worker's samples into its groups
            with statistics:
                outputs = model(inputs[group].double())
            (F.cross_entropy(outputs, labels[group], reduction="sum") / kn).backward()
        for p in parameters:
            p.of_samples = p.grad.clone()
        if optim["decay_in"] == "loss":
            sum(optim["weight_decay"] / 2 * p.square().sum() for p in parameters if p.dim() > 1).backward()
        statistics.update(full)
        for group in optimizer.param_groups:
            group.update(lr=learning_rate(recipe, step, steps_per_epoch, kn), full=full)
        optimizer.step()
        average = {name: d * average[name] + (1 - d) * value for name, value in state(model).items()}
    return state(model), average


def state(model):
    return {k: v.detach().clone() for k, v in model.state_dict().items() if v.is_floating_point()}


def learning_rate(recipe, step, steps_per_epoch, kn):
    """Linear scaling; warm-up; then divided by `factor` at each milestone (Goyal et al. 2017, section 2)."""
    schedule, peak = recipe["schedule"], recipe["optim"]["base_lr"] * kn / recipe["optim"]["base_batch"]
    warmup, start = schedule["warmup_epochs"] * steps_per_epoch, schedule["warmup_start_lr"]
    if step < warmup:
        return start + (peak - start) * step / warmup if schedule["warmup"] == "gradual" else start
    return peak / schedule["factor"] ** sum(step >= m * steps_per_epoch for m in schedule["milestones"])


def make_optimizer(parameters, optim):
    """torch's own where it has the rule. Biases and norms do not decay; decay in the loss is in the gradient by now."""
    decay, momentum = optim["weight_decay"] if optim["decay_in"] == "gradient" else 0, optim["momentum"]
    groups = [{"params": [p], "weight_decay": decay if p.dim() > 1 else 0} for p in parameters]
    if optim["name"] == "adam":
        return torch.optim.Adam(groups, betas=(momentum, optim["beta2"]), eps=optim["epsilon"])
    if optim["name"] == "sgd" and optim["form"] == "u":
        return torch.optim.SGD(groups, momentum=momentum, nesterov=optim["nesterov"])
    return Absorbing(groups, {"v": 0.0, **optim})


class Absorbing(torch.optim.Optimizer):
    """v <- m * v + lr * ratio * (g + decay * w), w <- w - v: eq. 10 of Goyal et al. 2017 (ratio 1), and LARS."""

    @torch.no_grad()
    def step(self):
        for o in self.param_groups:
            [w], lr, m, decay, ratio = o["params"], o["lr"], o["momentum"], o["weight_decay"], 1.0
            if o["name"] == "lars":
                o.update(nesterov=False, momentum_correction=False)
                if w.dim() > 1:  # by the norm of the mean over the samples that are there
                    mean = w.of_samples / o["full"] + (w.grad - w.of_samples)  # decay in the loss is whole in a tail
                    ratio = o["trust"] * w.norm() / (mean.norm() + decay * w.norm())
            change = lr * ratio * (w.grad + decay * w)
            carried = m * lr / o.get("last_lr", lr) if o["momentum_correction"] else m  # Remark 2
            o.update(v=carried * o["v"] + change, last_lr=lr)
            w -= change + m * o["v"] if o["nesterov"] else o["v"]

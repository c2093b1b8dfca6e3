"""The training that is timed where no recipe is named: a model by name on synthetic pictures."""

from __future__ import annotations

from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.recipe import Recipe

CLASSES = 10
LR, MOMENTUM, DECAY = 1e-3, 0.9, 1e-4
PARTS = ("forward_s", "backward_s", "exposed_comm_s", "optimizer_s")  # of a step, in order


def recipe_of(task: dict, ranks: int, batch: int) -> Recipe:
    """What `train` would run: one worker of `batch` samples a rank, the default mode of everything else but the
    machine keys that the task names."""
    mode = task["mode"]
    return recipes.validate(
        {
            "model": {"name": task["model"]},
            "data": {"image_size": task["image_size"], "classes": CLASSES},
            "batch": {"samples_per_worker": batch, "workers": ranks},
            "optim": {"base_lr": LR, "momentum": MOMENTUM, "weight_decay": DECAY},
            "train": {"noise_scale_steps": 0},
            "precision": task["precision"],
            "determinism": "any-ranks" if mode.startswith("any-ranks") else "off",
            "fixed_point": "int32" if mode == "any-ranks int32" else "int64",
            "wire": "fp16" if mode == "fp16" else "fp32",
            "machine": {
                "engine": "torch" if mode == "torch" else "horovod",
                "reduction": "fusion" if mode == "fusion" else "buckets",
                **task.get("machine", {}),
            },
        }
    )

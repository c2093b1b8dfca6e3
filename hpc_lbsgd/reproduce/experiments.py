"""Which runs make a paper's table, at three sizes, and what the paper measured. Pure: settings in, no run started.

A row is a set of recipe keys; every row is run with several seeds. Rows that two tables share are the same runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Scale:
    """The size of an experiment. Batches are in workers (k); n is the recipe's samples_per_worker."""

    name: str
    goyal: str  # shipped recipe of the Goyal tables
    smith: str  # shipped recipe of the Smith curves
    reference: int  # k at which base_lr is right
    large: int  # k at which the learning-rate rules part
    figure: tuple[int, ...]  # k of goyal-figure1
    smith_cap: int  # largest k of smith-momentum
    tradeoff: dict[int, int]  # k -> epochs of mccandlish-tradeoff
    target_loss: float  # training loss that mccandlish-tradeoff runs to
    lr_max: float  # where its learning rates level off, without momentum
    lr_turn: int  # k at half of that (eq. 2.6)
    noise_scale_steps: int  # how often mccandlish-tradeoff measures
    paper: bool = False  # the paper's own size: its figures belong to the same k


SCALES = {
    # 20,000 Fashion-MNIST images; n = 32, so kn = 32 is the reference and kn = 256 the large batch
    "small": Scale(
        name="small",
        goyal="reproduce-small",
        smith="reproduce-small-smith",
        reference=1,
        large=8,
        figure=(1, 2, 4, 8, 16, 32, 64, 128),
        smith_cap=40,
        tradeoff={1: 1, 2: 1, 4: 2, 8: 2, 16: 3, 32: 6, 64: 11},
        target_loss=0.6,
        lr_max=2.0,
        lr_turn=8,
        noise_scale_steps=10,
    ),
    "cifar10": Scale(
        name="cifar10",
        goyal="reproduce-cifar10",
        smith="smith-cifar10-original",
        reference=4,
        large=64,
        figure=(1, 2, 4, 8, 16, 32, 64, 128, 256),
        smith_cap=40,
        tradeoff={1: 4, 4: 4, 8: 5, 16: 6, 32: 8, 64: 12, 128: 20},
        target_loss=0.8,
        lr_max=2.0,
        lr_turn=16,
        noise_scale_steps=20,
    ),
    "imagenet": Scale(
        name="imagenet",
        goyal="goyal-resnet50",
        smith="smith-imagenet-decaying-lr",
        reference=8,
        large=256,
        figure=(4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048),
        smith_cap=2048,
        tradeoff={8: 6, 32: 6, 128: 8, 512: 12, 1024: 18, 2048: 30},
        target_loss=3.0,
        lr_max=64.0,
        lr_turn=512,
        noise_scale_steps=100,
        paper=True,
    ),
}


class Row(NamedTuple):
    """One line of a table."""

    label: str
    recipe: str
    settings: dict[str, Any]
    paper: str  # the paper's figure for its own line, with its batch


def row(recipe: str, label: str, paper: str, **settings: Any) -> Row:
    """A row of keyword settings, with __ for the dot in a key."""
    return Row(label, recipe, {key.replace("__", "."): value for key, value in settings.items()}, paper)


@dataclass(frozen=True)
class Experiment:
    """A table or figure. rows: of a scale; kind: how it is summarised and drawn."""

    name: str
    title: str
    source: str
    claim: str
    kind: str  # error | batches | curves | tradeoff
    rows: Callable[[Scale], list[Row]]


# ---------------------------------------------------------------- Goyal et al. 2017


def goyal(scale: Scale, label: str, workers: int, paper: str, **settings: Any) -> Row:
    return row(scale.goyal, label, paper, batch__workers=workers, **settings)


BASELINE, LARGE = "23.60 ± 0.12", "23.74 ± 0.09"  # ResNet-50, kn = 256 and 8k


def table1(scale: Scale) -> list[Row]:
    return [
        goyal(scale, "baseline", scale.reference, BASELINE),
        goyal(scale, "no warm-up", scale.large, "24.84 ± 0.37", schedule__warmup="none"),
        goyal(scale, "constant warm-up", scale.large, "25.88 ± 0.56", schedule__warmup="constant"),
        goyal(scale, "gradual warm-up", scale.large, LARGE),
    ]


def table2a(scale: Scale) -> list[Row]:
    lr = base_lr(scale)
    return [
        goyal(scale, "reference, half η", scale.reference, "23.92 ± 0.10", optim__base_lr=lr / 2),
        goyal(scale, "reference, η", scale.reference, BASELINE),
        goyal(scale, "reference, twice η", scale.reference, "23.68 ± 0.09", optim__base_lr=2 * lr),
        goyal(scale, "large, half η, linear", scale.large, "24.27 ± 0.08", optim__base_lr=lr / 2),
        goyal(scale, "large, η, linear", scale.large, LARGE),
        goyal(scale, "large, twice η, linear", scale.large, "24.05 ± 0.18", optim__base_lr=2 * lr),
        goyal(scale, "large, η, not scaled", scale.large, "41.67 ± 0.10", schedule__scaling="none"),
        goyal(scale, "large, η, square root", scale.large, "26.22 ± 0.03", schedule__scaling="sqrt"),
    ]


def table2b(scale: Scale) -> list[Row]:
    return [
        goyal(scale, "reference, γ = 1", scale.reference, "23.84 ± 0.18", model__zero_gamma=False),
        goyal(scale, "reference, γ = 0", scale.reference, BASELINE),
        goyal(scale, "large, γ = 1", scale.large, "24.11 ± 0.07", model__zero_gamma=False),
        goyal(scale, "large, γ = 0", scale.large, LARGE),
    ]


FIGURE1 = {  # kn -> error (Goyal et al. 2017, figure 1)
    128: "23.49 ± 0.12",
    256: BASELINE,
    512: "23.48 ± 0.09",
    1024: "23.53 ± 0.08",
    2048: "23.49 ± 0.11",
    4096: "23.56 ± 0.12",
    8192: LARGE,
    16384: "24.79 ± 0.27",
    32768: "27.55 ± 0.28",
    65536: "33.96 ± 0.80",
}


def figure1(scale: Scale) -> list[Row]:
    """kn relative to the reference, as the paper's relative to 256."""
    return [
        goyal(scale, f"{k / scale.reference:g} x reference", k, FIGURE1.get(256 * k // scale.reference, "–"))
        for k in scale.figure
    ]


# ---------------------------------------------------------------- Smith et al. 2018


def smith_schedules(scale: Scale) -> list[Row]:
    """Section 5.1: the learning rate decays, the batch grows once and then it decays, the batch grows."""
    if scale.paper:
        return [
            Row("decaying-lr", "smith-imagenet-decaying-lr", {}, "accuracy 78.7 / 77.8 %, 14,000 updates"),
            Row(
                "increasing-batch", "smith-imagenet-increasing-batch", {}, "accuracy 78.1 / 76.8 %, under 6,000 updates"
            ),
        ]
    _, lr, m, _ = smith_start(scale)
    variants = {
        "Nesterov": {"optim__nesterov": True},
        # the same noise scale without momentum
        "SGD": {"optim__momentum": 0.0, "optim__nesterov": False, "optim__base_lr": float(f"{lr / (1 - m):.6g}")},
    }
    rows = []
    for name, keys in variants.items():
        for kind in ("decaying-lr", "hybrid", "increasing-batch"):
            rows.append(row(scale.smith, f"{name}, {kind}", "the same curve", schedule__kind=kind, **keys))
    return rows


def smith_momentum(scale: Scale) -> list[Row]:
    """Section 5.2: larger initial learning rates and momentum need ever fewer updates. The noise scale
    lr * N / (B * (1 - m)) is the same in each row."""
    k, lr, m, cap = smith_start(scale)
    grow = {"schedule__kind": "increasing-batch", "schedule__max_batch": cap}
    batch = "batch__workers"
    if scale.paper:  # table 1 of the ImageNet section: momentum rises with the batch
        return [
            Row(f"m = {m}", recipe, {}, paper)
            for m, recipe, paper in (
                (0.9, "smith-imagenet-m90", "under 6,000 updates"),
                (0.95, "smith-imagenet-m95", "under 3,500 updates"),
                (0.975, "smith-imagenet-m975", "under 2,500 updates"),
            )
        ]
    raised = {"optim__base_lr": 5 * lr, "schedule__scaling": "none"}
    return [
        row(scale.smith, "original", "accuracy 94.3 %, 80,000 updates", schedule__kind="decaying-lr"),
        row(scale.smith, "increasing batch", "accuracy 94.4 %, 29,000 updates", **grow),
        row(
            scale.smith,
            "+ initial learning rate x 5",
            "accuracy 94.5 %, under 6,500 updates",
            **{batch: 5 * k},
            **raised,
            **grow,
        ),
        row(
            scale.smith,
            "+ momentum 0.98",
            "accuracy 93.3 %, under 2,500 updates",
            **{batch: 25 * k, "optim__momentum": round(1 - (1 - m) / 5, 10)},
            **raised,
            **grow,
        ),
    ]


# ---------------------------------------------------------------- McCandlish et al. 2018

LR_GRID = (1.0, 2.0, 4.0)  # the learning rate is tuned at every batch, as the theory asks


def mccandlish_tradeoff(scale: Scale) -> list[Row]:
    """Runs to one training loss at several batches and learning rates (section 2.3): plain SGD, constant rate."""
    rows = []
    for workers, epochs in scale.tradeoff.items():
        middle = scale.lr_max / (1 + scale.lr_turn / workers)  # linear at small batches, flat at large ones
        for factor in LR_GRID:
            settings = {
                "batch.workers": workers,
                "optim.base_lr": float(f"{middle * factor:.3g}"),
                "optim.momentum": 0.0,
                "optim.nesterov": False,
                "optim.weight_decay": 0.0,
                "schedule.kind": "constant",
                "schedule.scaling": "none",
                "schedule.warmup": "none",
                "schedule.milestones": [],
                "train.epochs": epochs,
                "train.noise_scale_steps": scale.noise_scale_steps,
                "train.eval_epochs": epochs,
            }
            rows.append(Row(f"k = {workers}, lr x {factor:g}", scale.goyal, settings, ""))
    return rows


# ---------------------------------------------------------------- all


def content(recipe: str) -> dict:
    from hpc_lbsgd.recipe import read

    return read(recipe).model_dump(mode="json")


def base_lr(scale: Scale) -> float:
    return content(scale.goyal)["optim"]["base_lr"]


def smith_start(scale: Scale) -> tuple[int, float, float, int]:
    """(k, lr, momentum, largest batch) that the Smith rows start from."""
    recipe = content(scale.smith)
    n = recipe["batch"]["samples_per_worker"]
    return recipe["batch"]["workers"], recipe["optim"]["base_lr"], recipe["optim"]["momentum"], scale.smith_cap * n


EXPERIMENTS = {
    e.name: e
    for e in (
        Experiment(
            "goyal-table1",
            "Warm-up at the large batch",
            "Goyal et al. 2017, table 1",
            "With gradual warm-up the large batch reaches the small batch's error; without, or with a constant one, "
            "it does not.",
            "error",
            table1,
        ),
        Experiment(
            "goyal-table2a",
            "Learning-rate rules",
            "Goyal et al. 2017, table 2a",
            "The linear rule keeps the error of the small batch; the square-root rule and an unscaled learning rate "
            "do not.",
            "error",
            table2a,
        ),
        Experiment(
            "goyal-table2b",
            "Initialisation of the last BatchNorm of a block",
            "Goyal et al. 2017, table 2b",
            "γ = 0 is better than γ = 1, at the large batch more than at the small one.",
            "error",
            table2b,
        ),
        Experiment(
            "goyal-figure1",
            "Error against the batch",
            "Goyal et al. 2017, figure 1",
            "The error stays that of the reference batch up to some batch, then rises.",
            "batches",
            figure1,
        ),
        Experiment(
            "smith-schedules",
            "Decay the learning rate, or grow the batch",
            "Smith et al. 2018, section 5.1",
            "The curves over epochs coincide; the updates shrink.",
            "curves",
            smith_schedules,
        ),
        Experiment(
            "smith-momentum",
            "Fewer updates: initial learning rate and momentum",
            "Smith et al. 2018, section 5.2",
            "The same accuracy with ever fewer updates; the raised momentum costs a little.",
            "curves",
            smith_momentum,
        ),
        Experiment(
            "mccandlish-tradeoff",
            "Steps against examples, and the noise scale that predicts them",
            "McCandlish et al. 2018, section 2.3 and table 1",
            "(S/S_min - 1)(E/E_min - 1) = 1, and B_crit is B_simple within a factor of ten.",
            "tradeoff",
            mccandlish_tradeoff,
        ),
    )
}

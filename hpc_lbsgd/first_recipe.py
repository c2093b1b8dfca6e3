"""`init DIR`: a first recipe for a person's own images, each choice with its reason beside it."""

from __future__ import annotations

import math
import os
import shlex
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml

from hpc_lbsgd import progress
from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.data import archive, tree
from hpc_lbsgd.data import manifest as manifests
from hpc_lbsgd.data.decode import pixels
from hpc_lbsgd.data.manifest import FILE_NAME, Manifest
from hpc_lbsgd.data.names import lists_of, read_excluded
from hpc_lbsgd.data.storage import open_storage
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.outline import outline, render
from hpc_lbsgd.records import write_atomically

TRAIN = ("train", "training")
EVALUATION = ("val", "valid", "validation", "eval", "test", "testing")
HELD_OUT = 0.1  # of each class, where a set has no part for evaluation
LOOKED_AT = 1000  # images, for channels, mean and standard deviation
SMALL_SIDE = 96  # pixels; square images of one size up to it are used as they are
SMALL_IMAGE = 64  # --small
REFERENCE = 256  # images that base_lr is right for (Goyal et al. 2017)


class Facts(NamedTuple):
    """What a recipe follows from."""

    train: Path
    evaluation: Path
    held_out: bool  # evaluation is a part that was taken from one set
    samples: int  # N
    classes: int
    side: int  # median shorter side, pixels
    as_they_are: bool  # square, of one size
    channels: int
    mean: list[float]
    std: list[float]


def init(folder: Path, out: Path | None, small: bool, exclude: bool, processes: int | None = None) -> Path:
    """Index the images of a folder, hold out a part where there is none for evaluation, and write a recipe.

    folder: DIR/CLASS/IMAGE, DIR/train and DIR/val (or test) of them, a tar, or a folder of tars. out: default NAME.yaml
    here. small: 64 pixels and ResNet-20, for CPUs and first looks. exclude: leave out images that do not decode. Raises
    RequestError where nothing can be made of it, or the recipe is there.
    """
    if not folder.exists():
        raise RequestError(f"{folder}: no such folder")
    out = out or Path(f"{folder.resolve().name.removesuffix('.tar')}.yaml")
    if out.exists():
        raise RequestError(f"{out}: is there already; name another file with --out")
    if not os.access(out.parent, os.W_OK):  # before all images are decoded
        raise RequestError(f"{out}: no such folder, or nothing can be written to it; name another file with --out")
    facts = examine(*parts_of(folder, exclude, processes))
    write_atomically(out, text(folder, out, facts, small))
    return out


# ---------------------------------------------------------------- the data


def parts_of(folder: Path, exclude: bool, processes: int | None) -> tuple[Manifest, Manifest, bool]:
    """(training, evaluation, whether the second was held out from one set)."""
    train = next((folder / name for name in TRAIN if (folder / name).is_dir()), None)
    evaluation = next((folder / name for name in EVALUATION if (folder / name).is_dir()), None)
    if train and evaluation:
        first = indexed(train, exclude, processes)
        return first, indexed(evaluation, exclude, processes, first.classes), False
    whole = indexed(train or folder, exclude, processes)
    rows = hold_out(whole.labels, len(whole.classes))
    if not rows.any():
        raise RequestError(f"{folder}: no class has two images: nothing can be held out for evaluation")
    beside = whole.path.parent
    chosen = (np.flatnonzero(~rows), beside / "train.arrow"), (np.flatnonzero(rows), beside / "eval.arrow")
    first, second = (manifests.pick(whole, path, which) for which, path in chosen)
    return first, second, True


def indexed(path: Path, exclude: bool, processes: int | None, classes: list[str] | None = None) -> Manifest:
    """The manifest of a folder or archive, made now where there is none."""
    if path.is_dir() and (path / FILE_NAME).exists():
        found = Manifest(path / FILE_NAME)
        found.check_files()
        made = datetime.fromtimestamp(found.path.stat().st_mtime)
        new = came_since(found, path)
        if new:
            raise RequestError(
                f"{path}: {len(new):,} images came since it was indexed on {made:%Y-%m-%d %H:%M}; index it again, then "
                f"start again: hpc-lbsgd data index {shlex.quote(str(path))} (earlier runs want the index they had)\n"
                f"{manifests.listed(new)}"
            )
        progress.note(f"{found.path}: the {len(found):,} images as they were listed on {made:%Y-%m-%d %H:%M}")
    else:
        make = archive.index if archive.is_archive(path) else tree.index
        found = make(path, None, processes, None, classes, exclude)
    if classes is not None and found.classes != classes:
        raise RequestError(f"{path}: its classes are not those of the training part; index it with --classes-of")
    if len(found.classes) < 2:
        raise RequestError(f"{path}: one class, {found.classes[0]!r}; expected {path}/CLASS/IMAGE with two or more")
    return found


def came_since(m: Manifest, folder: Path) -> list[str]:
    """Images of a folder that its index does not have, and that were not left out for what they are. Where classes came
    from a table all images count, else those in folders."""
    if m.shards:
        return []
    known = {m.key(i) for i in range(len(m))} | set(read_excluded(lists_of(m.path)))
    nested = all(os.sep in key for key in known)
    there = tree.images_below(folder, Counter())
    return sorted(path for path in there if path not in known and (os.sep in path or not nested))


def hold_out(labels: np.ndarray, classes: int) -> np.ndarray:
    """Which samples are for evaluation: HELD_OUT of each class at random, one at least of two. bool (N,),
    the same for the same labels."""
    chosen = np.zeros(len(labels), bool)
    rng = np.random.default_rng(0)
    for label in range(classes):
        rows = np.flatnonzero(labels == label)
        count = max(round(HELD_OUT * len(rows)), 1) if len(rows) > 1 else 0
        chosen[rng.permutation(rows)[:count]] = True
    return chosen


def examine(train: Manifest, evaluation: Manifest, held_out: bool) -> Facts:
    sides = np.minimum(train.widths, train.heights)
    sizes = [np.concatenate([getattr(m, key) for m in (train, evaluation)]) for key in ("widths", "heights")]
    one_size = len(np.unique(np.concatenate(sizes))) == 1
    side = int(np.median(sides))
    return Facts(
        train.path,
        evaluation.path,
        held_out,
        len(train),
        len(train.classes),
        side,
        one_size and side <= SMALL_SIDE,
        *colours(train),
    )


def colours(m: Manifest) -> tuple[int, list[float], list[float]]:
    """(channels, mean, standard deviation by channel, 0 to 255) of up to LOOKED_AT images, taken at even distances."""
    storage, channels = open_storage(m), m.raw_channels or 3
    count, sums, squares, grey = 0, np.zeros(3), np.zeros(3), True
    for i in np.unique(np.linspace(0, len(m) - 1, min(LOOKED_AT, len(m))).astype(int)):
        content = storage.read(int(i))
        image = content if m.raw_channels else pixels(content, channels)
        image = image.reshape(-1, image.shape[2]).astype(np.float64)
        grey = grey and bool((image == image[:, :1]).all())
        count += len(image)
        sums, squares = sums + image.sum(0), squares + np.square(image).sum(0)
    mean = sums / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 1.0))  # pictures of one colour have none
    channels = m.raw_channels or (1 if grey else 3)
    return channels, [round(float(v), 2) for v in mean[:channels]], [round(float(v), 2) for v in std[:channels]]


# ---------------------------------------------------------------- the recipe


class Choice(NamedTuple):
    """Numbers of a recipe, from N and the images' size."""

    model: str
    image_size: int
    eval_resize: int
    augment: str
    n: int
    k: int
    epochs: int
    milestones: list[int]
    weight_decay: float


def choose(facts: Facts, small: bool) -> Choice:
    kn = 2 ** int(math.log2(min(REFERENCE, max(8, facts.samples / 16))))
    n = min(32, kn // 2)  # two workers at least: one alone measures no noise scale, and keeps one rank busy
    steps = math.ceil(facts.samples / kn)
    epochs = 90 if facts.samples >= 200_000 else min(200, max(30, math.ceil(4000 / steps)))
    milestones = sorted({max(1, round(epochs * share)) for share in (1 / 3, 2 / 3, 8 / 9)})
    decay = 1e-4 if facts.samples >= 200_000 else 5e-4
    if facts.as_they_are:
        look = ("resnet20", facts.side, 0, "pad-crop" if facts.side <= 40 else "flip")
    else:
        wanted = SMALL_IMAGE if small else 224
        size = wanted if facts.side >= wanted * 7 / 8 else max(32, facts.side // 32 * 32)
        look = ("resnet20" if size <= SMALL_IMAGE else "resnet50", size, round(size * 256 / 224), "resized-crop")
    return Choice(*look, n, kn // n, epochs, milestones, decay)


def text(folder: Path, out: Path, facts: Facts, small: bool) -> str:
    """The recipe's file."""
    c, word = choose(facts, small), shlex.quote(str(out))
    kn = c.n * c.k
    warmup = min(5, max(1, c.epochs // 10))
    part = "a tenth of each class, held out by `init`" if facts.held_out else "what the set brings for evaluation"
    size = (
        f"all images are {facts.side}x{facts.side} and are used as they are"
        if facts.as_they_are
        else f"the shorter side of half of the images is {facts.side} or more"
    )
    why_augment = {
        "pad-crop": "moved by up to 4 pixels, mirrored",
        "flip": "mirrored or not",
        "resized-crop": "a window of 8 to 100 % of the area, mirrored or not (Goyal et al. 2017, section 5.1)",
    }[c.augment]
    deep = c.model == "resnet50"
    lines: Sequence[tuple[str, str] | str] = [
        f"# {in_a_line(folder.resolve().name)}: {facts.samples:,} images in {facts.classes} classes; written by "
        "`hpc-lbsgd init`. Every key: docs/recipe.md",
        f"#   {in_a_line(f'hpc-lbsgd plan {word}')}",
        f"#   {in_a_line(f'hpc-lbsgd launch --np 2 -- train {word}')}       (a rank a GPU, or a core)",
        ("determinism: any-ranks", "the same weights, bit for bit, on any number of ranks"),
        "data:",
        (f"  train: {quoted(facts.train)}", ""),
        (f"  eval: {quoted(facts.evaluation)}", part),
        (f"  samples: {facts.samples}", "checked against the data at each start, as the next"),
        (f"  classes: {facts.classes}", ""),
        (f"  channels: {facts.channels}", "grey" if facts.channels == 1 else "colour"),
        (f"  image_size: {c.image_size}", size),
        (f"  augment: {c.augment}", why_augment),
        (
            f"  eval_resize: {c.eval_resize}",
            "images have their size already"
            if facts.as_they_are
            else f"the shorter side before the centre {c.image_size} pixels are cut",
        ),
        (f"  mean: {facts.mean}", f"of up to {LOOKED_AT:,} training images"),
        (f"  std: {facts.std}", ""),
        "model:",
        (
            f"  name: {c.model}",
            "small, for small images; hours on CPUs would be days with resnet50"
            if not deep
            else "wants GPUs: on CPUs `init --small` gives a smaller one",
        ),
        ("  # init_from: WEIGHTS.pt", "of a like task: far fewer epochs will do, and far fewer images"),
        "batch:",
        (f"  samples_per_worker: {c.n}", "n, what BatchNorm sees together (Goyal et al. 2017, section 2.3)"),
        (f"  workers: {c.k}", f"k: {kn} images a step, {math.ceil(facts.samples / kn)} steps an epoch"),
        "optim:",
        ("  base_lr: 0.1", f"right at {REFERENCE} images a step; {kn} get {0.1 * kn / REFERENCE:g}, by linear scaling"),
        ("  momentum: 0.9", ""),
        (f"  weight_decay: {c.weight_decay}", "the usual for a set of this size"),
        "schedule:",
        ("  kind: decaying-lr", "a tenth at each milestone; most of the accuracy comes after the first"),
        (f"  milestones: {c.milestones}", "at 1/3, 2/3 and 8/9 of the run (Goyal: 30, 60, 80 of 90)"),
        ("  warmup: gradual", f"from 0.1, acts above {REFERENCE} images a step: for the day when k grows"),
        (f"  warmup_epochs: {warmup}", ""),
        "train:",
        (f"  epochs: {c.epochs}", f"{c.epochs * math.ceil(facts.samples / kn):,} steps"),
        "checkpoint:",
        ("  minutes: 10", "beside the best one; Ctrl-C and time limits write one, too"),
    ]
    return "\n".join(line if isinstance(line, str) else with_reason(*line) for line in lines) + "\n"


def with_reason(line: str, reason: str) -> str:
    return f"{line:32s}  # {reason}" if reason else line


def in_a_line(text: str) -> str:
    """What a comment can hold: names of folders may have line ends in them."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def quoted(path: Path) -> str:
    """A path as YAML has it: relative to here where it lies below."""
    found = os.path.relpath(path)
    found = str(path.resolve()) if found.startswith("..") else found
    if found.replace("/", "").replace("-", "").replace("_", "").replace(".", "").isalnum():
        return found
    return yaml.safe_dump(found, default_style='"', allow_unicode=True, width=math.inf).strip()


def show(out: Path) -> str:
    """What was written, and what comes next."""
    recipe = recipes.read(str(out))
    return "\n".join(
        [
            f"{out}: written; read it, each choice has its reason beside it",
            render(out.stem, outline(recipe, recipe.build_schedule(recipe.data.samples or 0), 1), recipe),
            f"next:  hpc-lbsgd plan {shlex.quote(str(out))}",
            f"       hpc-lbsgd launch --np 2 -- train {shlex.quote(str(out))}",
        ]
    )

"""`data show`: look at a set as a model sees it. Samples by class with what the loader makes of them, images a class,
and how large they are: one picture, or one page with all in it."""

from __future__ import annotations

import base64
import html
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from hpc_lbsgd.data import decode, labels, loader, orientation
from hpc_lbsgd.data.columns import slices
from hpc_lbsgd.data.fields import IMAGE, Field
from hpc_lbsgd.data.find import find
from hpc_lbsgd.data.manifest import Manifest
from hpc_lbsgd.data.storage import Request, open_storage
from hpc_lbsgd.data.targets import Inputs, tensors
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.recipe import Data, Machine
from hpc_lbsgd.records import write_atomically

PER_CLASS, EPOCHS = 2, 4
LOOKED_AT = 1_000_000  # rows; a larger set is seen in as many that lie evenly
CELL, GAP, DPI = 0.95, 0.1, 100  # inches; between samples, in cells; dots an inch
STYLE = (
    "body{font:15px sans-serif;max-width:75em;margin:2em auto}img{width:100%}td,th{text-align:left;padding-right:2em}"
)


@dataclass
class Shown:
    """What is looked at: `samples`, PER_CLASS of each of some classes. Pixels of 0 to 255: `stored` (H, W, C) each,
    `seen` (epochs, samples, S, S, C). Several pictures of a sample are side by side."""

    manifest: Manifest
    data: Data
    seed: int
    samples: np.ndarray
    stored: list[np.ndarray]
    seen: np.ndarray


def section_for(m: Manifest) -> Data:
    """Where no recipe says more: a recipe's defaults, by the loader that is always there."""
    if m.raw_channels == 1:
        return Data(loader="torchvision", channels=1, mean=[0.0], std=[1.0])
    return Data(loader="torchvision")


def chosen(m: Manifest, classes: int, seed: int) -> np.ndarray:
    """Samples of up to so many classes, that lie evenly among those that have any, chosen by the seed; as many of all,
    where there are no classes."""
    rows = np.unique(np.linspace(0, len(m) - 1, min(len(m), LOOKED_AT)).astype(np.int64))
    if not m.classes:
        return np.sort(np.random.default_rng(seed).choice(rows, min(len(rows), PER_CLASS * classes), replace=False))
    found = m.labels[rows]
    there = np.unique(found)
    some = there[np.unique(np.linspace(0, len(there) - 1, min(len(there), classes)).astype(int))]
    rng = np.random.default_rng(seed)
    picked = []
    for label in some:
        mine = rows[found == label]
        picked.append(np.sort(rng.choice(mine, min(PER_CLASS, len(mine)), replace=False)))
    return np.concatenate(picked)


def look(m: Manifest, data: Data, seed: int, classes: int) -> Shown:
    """Raises RequestError for images that do not fit the section, RunError for those that cannot be decoded."""
    if not len(m):
        raise RequestError(f"{m.path}: exclude.txt beside it leaves no image")
    pictures = [name for name, field in m.fields.items() if field.kind == IMAGE]
    data = data.model_copy(update={"inputs": pictures, "targets": pictures, "encode": {}})
    loader.check_sizes(data, m, True)
    samples = chosen(m, classes, seed)
    made = loader.create(data, m, seed, True, 8, 1, 1, False, torch.device("cpu"), Machine().prefetch_mb)
    parts = [samples[i : i + 8] for i in range(0, len(samples), 8)]
    batches = [side_by_side(b.inputs) for b in made.batches(Request(e, part) for e in range(EPOCHS) for part in parts)]
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (data.mean, data.std))
    pixels = (torch.cat(batches) * std + mean).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    storage = open_storage(m)
    stored = []
    for i in samples.tolist():
        contents = [storage.read(i, None if name == IMAGE else name) for name in pictures]
        images = contents if m.raw_channels else [decode.pixels(content, data.channels) for content in contents]
        if data.orientation == "apply":
            images = [orientation.turned(image, int(m.orientations[i])) for image in images]
        stored.append(np.concatenate(images, axis=1))
    return Shown(m, data, seed, samples, stored, pixels.reshape(EPOCHS, len(samples), *pixels.shape[1:]))


def side_by_side(inputs: Inputs) -> torch.Tensor:
    """(B, C, S, pictures * S) of one picture a sample, or several by name."""
    return torch.cat(tensors(inputs), dim=3)


# ---------------------------------------------------------------- pictures


def plain(text: str, longest: int = 200) -> str:
    """A name that may have any bytes, for people; matplotlib sets what is between dollar signs as a formula."""
    text = text.encode("utf-8", "replace").decode()
    return (text if len(text) <= longest else text[: longest - 3] + "...").replace("$", r"\$")


def sheet(figure, shown: Shown) -> None:
    """A row a class: each sample as it is stored, then in epochs 0 to EPOCHS - 1."""
    m, by_class = shown.manifest, {}
    for place, row in enumerate(rows_of(shown)):
        by_class.setdefault(row, []).append(place)
    widths = [*[1.0] * (1 + EPOCHS), GAP] * PER_CLASS
    axes = figure.subplots(len(by_class), len(widths), squeeze=False, width_ratios=widths)
    for row, places in zip(axes, by_class.values(), strict=True):
        for axis in row:
            axis.set_axis_off()
            axis.set_box_aspect(None if axis in row[1 + EPOCHS :: 2 + EPOCHS] else 1)  # empty ones too; not the gaps
        for number, place in enumerate(places):
            first = number * (2 + EPOCHS)
            for axis, pixels in zip(
                row[first:], map(squared, [shown.stored[place], *shown.seen[:, place]]), strict=False
            ):
                axis.imshow(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels, cmap="gray", vmin=0, vmax=255)
            row[first].set_title(plain(told(m, int(shown.samples[place])), 60), fontsize=8, loc="left", pad=3)
    titles = ["stored", *(f"epoch {e}" for e in range(EPOCHS)), ""] * PER_CLASS
    for axis, title in zip(axes[-1], titles, strict=True):
        axis.text(0.5, -0.05, title, transform=axis.transAxes, ha="center", va="top", fontsize=8)


def rows_of(shown: Shown) -> list[int]:
    """The row of the sheet that each sample is in."""
    m = shown.manifest
    return m.labels[shown.samples].tolist() if m.classes else [i // PER_CLASS for i in range(len(shown.samples))]


def told(m: Manifest, sample: int) -> str:
    """What is known of a sample beside its image."""
    own = (said for name, field in m.own_fields.items() if (said := of_field(m, name, field, sample)))
    return ", ".join([*([m.classes[m.labels[sample]]] if m.classes else []), *own])


def of_field(m: Manifest, name: str, field: Field, sample: int) -> str | None:
    """None of what is in pictures, and of lists."""
    if field.kind == "text":
        return f"{name} {m.values(name)[sample]!r}"
    if field.kind == "bytes":
        return f"{name} {m.of_file(name, 'bytes')[sample]} bytes"
    return f"{name} {m.values(name)[sample]:.4g}" if field.length is None and field.kind in ("int", "float") else None


def squared(image: np.ndarray) -> np.ndarray:
    """An image (H, W, C) in the middle of a white square."""
    height, width, channels = image.shape
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    square = np.full((side, side, channels), 255, np.uint8)
    square[top : top + height, left : left + width] = image
    return square


def charts(figure, m: Manifest) -> None:
    """How many images each class has, and how large they are."""
    counts = sum(np.bincount(m.labels[some], minlength=len(m.classes)) for some in slices(len(m)))
    some = np.unique(np.linspace(0, len(m) - 1, min(len(m), LOOKED_AT)).astype(np.int64))
    left, middle, right = figure.subplots(1, 3)
    left.bar(np.arange(len(counts)), counts, width=1.0 if len(counts) > 50 else 0.8)
    left.set(title="images a class", xlabel="class", ylim=(0, None))
    if len(m.classes) == len(counts) <= 10:
        left.set_xticks(
            range(len(counts)), [plain(name, 14) for name in m.classes], rotation=30, ha="right", fontsize=7
        )
    middle.scatter(m.widths[some], m.heights[some], s=4, alpha=0.3, rasterized=True)
    middle.set(title="sizes as stored", xlabel="width [pixels]", ylabel="height [pixels]")
    middle.set(xlim=(0, None), ylim=(0, None))
    right.hist(m.sizes[some] / 1e3, bins=40)
    right.set(title="bytes an image", xlabel="kB", ylabel="images")


def size_of(shown: Shown) -> tuple[float, float]:
    rows = len(set(rows_of(shown)))
    return PER_CLASS * (1 + EPOCHS + GAP) * CELL, rows * (CELL + 0.2) + 0.3


def headline(shown: Shown) -> str:
    m, d = shown.manifest, shown.data
    own = f", fields {', '.join(m.own_fields)}" if m.own_fields else ""
    return (
        f"{len(m):,} images in {len(m.classes):,} classes{own}; {d.augment} to {d.image_size} pixels, orientation "
        f"{d.orientation}, seed {shown.seed}"
    )


def png(shown: Shown) -> bytes:
    """Sheet and charts in one picture."""
    width, height = size_of(shown)
    figure = Figure(figsize=(width, height + 3.6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[height, 3.2])
    top.suptitle(f"{plain(str(shown.manifest.path))}\n{plain(headline(shown))}", fontsize=9)
    sheet(top, shown)
    charts(bottom, shown.manifest)
    return encoded(figure)


def encoded(figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=DPI)
    return out.getvalue()


def page(shown: Shown) -> str:
    """One HTML file that needs no other."""
    m = shown.manifest
    above, below = Figure(figsize=size_of(shown), layout="constrained"), Figure(figsize=(10, 3.4), layout="constrained")
    sheet(above, shown)
    charts(below, m)
    pictures = [
        f'<img alt="" src="data:image/png;base64,{base64.b64encode(encoded(f)).decode()}">' for f in (above, below)
    ]
    counts = sum(np.bincount(m.labels[some], minlength=len(m.classes)) for some in slices(len(m))).tolist()
    rows = "".join(
        f"<tr><td>{i}<td>{escape(c)}<td>{n}" for i, (c, n) in enumerate(zip(m.classes, counts, strict=False))
    )
    files = "".join(f"<tr><td>{escape(told(m, i))}<td>{escape(m.file(i))}" for i in shown.samples.tolist())
    doubts = "".join(f"<p><b>WARNING:</b> {escape(doubt)}" for doubt in labels.doubts(m.classes, m.labels))
    return (
        f'<!doctype html><meta charset="utf-8"><title>{escape(m.path.name)}</title><style>{STYLE}</style>'
        f"<h1>{escape(str(m.path))}</h1><p>{escape(headline(shown))}{doubts}"
        f"<h2>As the model sees it</h2>{pictures[0]}<details><summary>Which files these are</summary>"
        f"<table>{files}</table></details><h2>How many, how large</h2>{pictures[1]}"
        f"<details><summary>Images a class</summary><table>{rows}</table></details>\n"
    )


def escape(text: str) -> str:
    return html.escape(text.encode("utf-8", "replace").decode())


def show(
    path: str | Path, data: Data | None, seed: int, classes: int, png_to: Path | None, html_to: Path | None
) -> Shown:
    """Write what was asked for; data: a recipe's section."""
    m = Manifest(find(path))
    if m.own:
        raise RequestError(f"{m.path}: samples of your own are no pictures; there is nothing to be shown")
    shown = look(m, data or section_for(m), seed, classes)
    for target, make in ((png_to, png), (html_to, page)):
        try:
            if target:
                write_atomically(target, make(shown))
        except OSError as problem:
            raise RequestError(f"cannot write {target}: {problem.strerror or problem}") from None
    return shown

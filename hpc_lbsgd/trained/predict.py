"""`predict`: the classes of image files, prepared as the run's evaluation prepares its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from hpc_lbsgd import progress
from hpc_lbsgd.data import augment
from hpc_lbsgd.data.decode import pixels
from hpc_lbsgd.data.fields import CLASS, IMAGE
from hpc_lbsgd.data.finish import Finish, cut
from hpc_lbsgd.data.manifest import SUFFIXES
from hpc_lbsgd.data.who import set_of
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.parallel.world import cores
from hpc_lbsgd.trained.opened import Trained

BATCH = 64  # images


class Prediction(NamedTuple):
    """What the model says of one image, the likeliest first; or what is wrong with the image."""

    path: str
    classes: list[str]
    shares: list[float]  # softmax of the model's outputs
    problem: str | None = None


def images_of(names: Sequence[str]) -> list[str]:
    """Files as named; of a folder every image below it, by name. Raises RequestError for what is not there."""
    found: list[str] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            below = sorted(str(p) for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            if not below:
                raise RequestError(f"{name}: no images in it ({', '.join(sorted(SUFFIXES))})")
            found += below
        elif path.is_file():
            found.append(name)
        else:
            raise RequestError(f"{name}: no such file or folder")
    return found


def predict(found: Trained, paths: Sequence[str], top: int) -> Iterator[Prediction]:
    """A prediction an image, in order. Raises RequestError for a run that is not about images and classes."""
    recipe, names = found.recipe, found.classes()
    if recipe.data.dataset:
        raise RequestError(
            f"{found.folder.path}: trained on data of its own ({recipe.data.dataset}), not on image files; `evaluate` "
            "asks that data, `export` gives the model"
        )
    data = recipe.data
    if (before := set_of(data)) is not None and before.own:
        raise RequestError(f"{data.train}: packed samples of your own are no image files; `evaluate` asks that data")
    if data.inputs != [IMAGE]:
        raise RequestError(
            f"{found.folder.path}: its model gets {', '.join(data.inputs)}, not an image alone; `evaluate` asks its "
            "data, `export` gives the model"
        )
    if data.targets != [CLASS]:
        raise RequestError(
            f"{found.folder.path}: trained for {', '.join(data.targets)}, not for one class an image; `evaluate` asks "
            "its data, `export` gives the model"
        )
    finish = Finish(data, data.eval_resize > 0, found.channels_last, cores())
    with progress.bar(total=len(paths), desc="predicting", unit="image") as bar:
        for start in range(0, len(paths), BATCH):
            some = paths[start : start + BATCH]
            read = [window_of(path, data) for path in some]
            good = [w for w in read if isinstance(w, np.ndarray)]
            said = iter(classify(found, finish, good, names, top) if good else [])
            for path, window in zip(some, read, strict=True):
                yield Prediction(path, [], [], window) if isinstance(window, str) else Prediction(path, *next(said))
            bar.update(len(some))


def window_of(path: str, data) -> np.ndarray | str:
    """What evaluation would see of an image, uint8 (h, w, C); or what is wrong with it."""
    try:
        image = pixels(Path(path).read_bytes(), data.channels, data.orientation == "apply")
    except (OSError, ValueError) as problem:
        return getattr(problem, "strerror", None) or str(problem)
    height, width = image.shape[:2]
    if not data.eval_resize:
        if (width, height) != (data.image_size, data.image_size):
            return (
                f"is {width}x{height}; the run's images are {data.image_size}x{data.image_size} as they are stored, "
                "and it resizes none (data.eval_resize = 0): scale it as the training images were"
            )
        return image
    w = augment.centre(np.array([width]), np.array([height]), data.image_size, data.eval_resize)
    return cut(image, int(w.x[0]), int(w.y[0]), int(w.w[0]), int(w.h[0]))


def classify(
    found: Trained, finish: Finish, windows: list[np.ndarray], names: list[str], top: int
) -> Iterator[tuple[list[str], list[float]]]:
    """(classes, shares) of each window, the likeliest first."""
    images = finish.into(finish.empty(len(windows)), windows, np.zeros(len(windows), bool))
    with torch.no_grad():
        outputs = found.outputs(images.to(found.device))
    if not (isinstance(outputs, torch.Tensor) and outputs.shape == (len(windows), len(names))):
        shape = tuple(outputs.shape) if isinstance(outputs, torch.Tensor) else type(outputs).__name__
        raise RequestError(
            f"{found.folder.path}: the model's outputs ({shape}) are not one number a class (B, {len(names)}); "
            "`export` gives the model"
        )
    shares, order = outputs.double().softmax(1).sort(dim=1, descending=True, stable=True)
    for best, which in zip(shares[:, :top].tolist(), order[:, :top].tolist(), strict=True):
        yield [names[i] for i in which], best

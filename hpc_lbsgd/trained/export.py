"""`export`: a run's model for other programs. Each file is read back and asked the same images as the original."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from hpc_lbsgd.data.fields import IMAGE
from hpc_lbsgd.data.user import UserSet
from hpc_lbsgd.errors import RequestError, RunError
from hpc_lbsgd.train.replica import DTYPES
from hpc_lbsgd.trained.opened import Trained

WEIGHTS_ALONE = "this format is for one input that is a tensor; .pt and .safetensors hold its weights"
ASKED = 4  # images that original and copy are compared on
LARGEST_DIFFERENCE = 1e-3  # of outputs, relative to the largest: other programs sum in other orders


def export(found: Trained, out: Path) -> dict:
    """Write the model in the format that the file's suffix names (FORMATS); returns {file, format, step, averaged,
    bytes, largest_difference}: of outputs for random images, relative to the largest output; null where the file holds
    weights alone, which are compared bit by bit.

    Raises RequestError for an unknown suffix, a file that is there, a missing package; RunError where the copy is not
    what was written.
    """
    write = FORMATS.get(out.suffix)
    if write is None:
        raise RequestError(f"--out {out}: the suffix says the format; known: {', '.join(FORMATS)}")
    if out.exists():
        raise RequestError(f"--out {out}: is there already; name another file")
    if not out.parent.is_dir():
        raise RequestError(f"--out {out}: no such folder")
    building = out.with_name(f".{os.getpid()}.{out.name}")
    try:
        difference = write(found, building)
        if difference is not None and not difference < LARGEST_DIFFERENCE:
            raise RunError(f"{out}: not written: the copy's outputs differ from the model's by {difference:.1e}")
        os.replace(building, out)
    except OSError as problem:
        raise RequestError(f"--out {out}: cannot be written: {problem.strerror or problem}") from None
    finally:
        building.unlink(missing_ok=True)
    return {
        "file": str(out),
        "format": out.suffix.removeprefix("."),
        "step": found.step,
        "averaged": found.averaged,
        "bytes": out.stat().st_size,
        "largest_difference": difference,
    }


def about(found: Trained) -> dict[str, str]:
    """What a user of the file has to know: classes, and how images are prepared. Values are text."""
    data = found.recipe.data
    facts = {
        "classes": found.classes(),
        "channels": data.channels,
        "image_size": data.image_size,
        "eval_resize": data.eval_resize,
        "mean": data.mean,
        "std": data.std,
        "step": found.step,
        "averaged": found.averaged,
        "recipe_fingerprint": found.recipe.fingerprint(),
    }
    return {key: json.dumps(value) for key, value in facts.items()}


# ---------------------------------------------------------------- formats


def state_dict(found: Trained, path: Path) -> None:
    """torch's own: names and tensors, for `model.load_state_dict(torch.load(path, weights_only=True))`."""
    torch.save(found.model.state_dict(), path)
    same_weights(found, torch.load(path, weights_only=True))


def safetensors(found: Trained, path: Path) -> None:
    """Hugging Face's: weights under all their names, facts in the header."""
    try:
        from safetensors.torch import load_file, save_file
    except ImportError:
        raise RequestError("--out FILE.safetensors: pip install safetensors") from None
    # tied weights have several names, and the format knows no sharing
    save_file({k: v.contiguous().clone() for k, v in found.model.state_dict().items()}, path, metadata=about(found))
    same_weights(found, load_file(path))


def program(found: Trained, path: Path) -> float:
    """torch.export's: model and weights in one file, for `torch.export.load(path).module()`, without its code."""
    images = like_images(found)
    with traced(path):
        exported = torch.export.export(found.model, (images,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    with warnings.catch_warnings():  # of weights that are views, as all of ours were in training
        warnings.filterwarnings("ignore", message="No complete tensor found")
        torch.export.save(exported, path, extra_files=about(found))
    return difference(found, torch.export.load(path).module())


def onnx(found: Trained, path: Path) -> float:
    """Open Neural Network Exchange, for other runtimes; compared by onnxruntime."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 - torch's exporter wants it, and says so late
    except ImportError as problem:
        raise RequestError(f"--out FILE.onnx: pip install onnx onnxscript onnxruntime ({problem})") from None
    import onnx as onnx_files

    with traced(path):
        made = torch.onnx.export(
            found.model,
            (like_images(found),),
            dynamo=True,
            input_names=["images"],
            output_names=["outputs"],
            dynamic_shapes=({0: torch.export.Dim.AUTO},),
            verbose=False,
        )
    onnx_files.helper.set_model_props(made.model_proto, about(found))
    onnx_files.save(made.model_proto, path)
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as problem:  # what it has no kernel for: convolutions in float64
        raise RunError(
            f"--out FILE.onnx: onnxruntime cannot run it ({str(problem).splitlines()[0]}); .pt2, .pt and .safetensors "
            "hold it as it is"
        ) from None
    return difference(found, lambda images: list(map(torch.from_numpy, session.run(None, {"images": images.numpy()}))))


FORMATS: dict[str, Callable[[Trained, Path], float | None]] = {
    ".pt": state_dict,
    ".safetensors": safetensors,
    ".pt2": program,
    ".onnx": onnx,
}


@contextlib.contextmanager
def traced(path: Path):
    """Around torch's exporters, which follow no branch that depends on values. Raises RunError with what they say."""
    try:
        yield
    except RequestError:
        raise
    except Exception as problem:  # they raise many kinds
        said = next((line for line in str(problem).splitlines() if line.strip()), type(problem).__name__)
        raise RunError(
            f"--out FILE{path.suffix}: torch cannot follow this model for an image (C, S, S) of the recipe's: {said}; "
            ".pt and .safetensors hold its weights"
        ) from None


# ---------------------------------------------------------------- read back


def like_images(found: Trained, count: int = ASKED) -> torch.Tensor:
    """What the model sees: (count, C, S, S) random images, normalised; (count, ...) of a set of its own."""
    data, dtype = found.recipe.data, DTYPES[found.recipe.precision]
    if data.inputs != [IMAGE]:
        raise RequestError(f"a model of {', '.join(data.inputs)}: {WEIGHTS_ALONE}")
    if data.dataset:
        own = UserSet(data.dataset, "eval")
        if not isinstance(own.sample(0, found.recipe.seed, 0)[0], torch.Tensor):
            raise RequestError(f"a model of what {data.dataset} gives by name: {WEIGHTS_ALONE}")
        inputs = torch.stack([own.sample(i % len(own), found.recipe.seed, 0)[0] for i in range(count)])
        return inputs.to(dtype) if inputs.is_floating_point() or inputs.dtype == torch.uint8 else inputs
    shape = (count, data.channels, data.image_size, data.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def same_weights(found: Trained, copy: dict[str, torch.Tensor]) -> None:
    own = found.model.state_dict()
    wrong = [k for k in own.keys() | copy.keys() if k not in own or k not in copy or not torch.equal(own[k], copy[k])]
    if wrong:
        raise RunError(f"read back, {wrong[0]} is not what was written")


def difference(found: Trained, copy: Callable) -> float:
    """Largest difference of outputs, relative to the largest; for another number of images than it was made of."""
    images = like_images(found, ASKED + 1)
    with torch.no_grad():
        own, other = tensors(found.model(images)), tensors(copy(images))
    if [t.shape for t in own] != [t.shape for t in other]:
        raise RunError(f"read back, it has outputs {shapes(other)}, the model {shapes(own)}")
    pairs = [(a.double(), b.double()) for a, b in zip(own, other, strict=True)]
    apart = [(a - b).abs().max() / a.abs().max().clamp_min(1e-30) for a, b in pairs]
    return float(torch.stack(apart).max())  # NaN if one is


def tensors(outputs) -> list[torch.Tensor]:
    """The tensors of a model's outputs, in order: formats keep them, not what holds them."""
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    parts = outputs.values() if isinstance(outputs, dict) else outputs or ()
    return [tensor for part in parts for tensor in tensors(part)]


def shapes(found: list[torch.Tensor]) -> str:
    return ", ".join(str(tuple(t.shape)) for t in found)

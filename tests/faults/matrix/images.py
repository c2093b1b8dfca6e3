"""Images that go, or change, while a run reads them: what `data.on_bad_image` says happens."""

from __future__ import annotations

import functools
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import runs
from core import Injection, Row, hold, one_line
from hurt import fail_at

from hpc_lbsgd.data import tree
from hpc_lbsgd.data.manifest import FILE_NAME, Manifest
from hpc_lbsgd.records import read_metrics
from hpc_lbsgd.train import checkpoint

SAMPLES = 96
AHEAD = 8  # steps that a loader may be ahead


@functools.cache
def images() -> Path:
    from conftest import write_images

    folder = Path(tempfile.mkdtemp(prefix="faults-images-"))
    write_images(folder / "images", SAMPLES, 4)
    return folder / "images"


def spoil(path: Path, how: str, rng: random.Random) -> None:
    content = path.read_bytes()
    if how == "removed":
        path.unlink()
    elif how == "truncated":
        os.truncate(path, rng.randrange(len(content)))
    elif how == "replaced":  # by bytes that are no image; size and time tell nothing
        stat = path.stat()
        path.write_bytes(bytes(rng.randrange(256) for _ in content))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    else:  # by another image of another size
        from PIL import Image

        other = np.random.default_rng(rng.randrange(10**6)).integers(0, 256, (9, 9)).astype(np.uint8)
        Image.fromarray(other).save(path)


def one(rng: random.Random, folder: Path) -> Iterator[Injection]:
    root = shutil.copytree(images(), folder / "images")
    tree.index(root, processes=1)
    policy, how = rng.choice(["error", "skip"]), rng.choice(["removed", "truncated", "replaced", "another image"])
    ranks, loader = rng.randint(1, 3), rng.choice(["dali", "torchvision"])
    found = Manifest(root / FILE_NAME)
    victims = [Path(found.file(i)) for i in rng.sample(range(SAMPLES), rng.randint(1, 5))]
    step = rng.randint(1, 12)
    moment = f"{len(victims)} of {SAMPLES} {how} at step {step}, {ranks} ranks, on_bad_image {policy}, {loader}"
    # evaluation replaces nothing: there is none
    data = {"dataset": None, "train": str(root), "eval": None, "image_size": 4, "augment": "flip", "eval_resize": 0,
            "on_bad_image": policy, "loader": loader}  # fmt: skip
    path = runs.recipe(folder, data=data, model={"name": "hurt:image_model"}, checkpoint={"steps": 3, "keep": 99},
                       train={"preflight": False, "noise_scale_steps": 0})  # fmt: skip
    run, mark, go = folder / "run", folder / "mark", folder / "go"
    job = runs.train(ranks, path, run, env=fail_at(0, step, "wait", mark=str(mark), go=str(go)))
    hold(job.wait_for(mark.exists, 60), f"{moment}: it did not happen", job.said)
    for victim in victims:
        spoil(victim, how, rng)
    go.touch()
    begun = time.monotonic()
    gone = job.wait(60)
    took = time.monotonic() - begun
    job.end()
    hold(gone and "Traceback" not in job.said, f"{moment}: {job.codes}", job.said)
    said, codes = one_line(job.said), set(job.codes.values())
    replaced = sum(r.get("replaced", 0) for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "step")
    if policy == "error":
        hold(0 not in codes and runs.status(run).get("status") == "failed", f"{moment}: {job.codes}", job.said)
        hold(any(v.name in said for v in victims), f"{moment}: not named: {said}", job.said)
        mend(victims, root)
        runs.finished(rng.randint(1, 3), path, run, "--resume")
        yield Injection(moment, "the run ends", round(took, 2), 0, said)
        return
    other = rng.choice([r for r in (1, 2, 3) if r != ranks])
    if "cross-check" in said:  # one rank read an image before, the other after
        hold("a sample changed on disk" in said, f"{moment}: {said}")
        runs.finished(other, path, run, "--resume")
        runs.whole(run)
        yield Injection(moment, "two ranks read it differently, and a cross-check said so", round(took, 2), 0, said)
        return
    hold(codes == {0} and replaced >= len(victims), f"{moment}: {job.codes}, {replaced} replaced", job.said)
    # from a checkpoint after it on, another number of ranks comes to the same weights
    whole, again = runs.ending(run), shutil.copytree(run, folder / "again")
    for there in checkpoint.steps_there(again / "checkpoints"):
        if there > max(step + AHEAD, 15):
            shutil.rmtree(again / "checkpoints" / checkpoint.name_of(there))
    digest = runs.finished(other, path, again, "--resume")
    hold(digest == whole, f"{moment}: other weights on {other} ranks")
    yield Injection(moment, f"{replaced} replaced", round(took, 2), 0, next(
        (line for line in job.said.splitlines() if "could not be read" in line), ""))  # fmt: skip


def mend(victims: list[Path], root: Path) -> None:
    """As the messages advise: the image comes back."""
    for victim in victims:
        shutil.copy2(images() / victim.relative_to(root), victim)


ROWS = [
    Row("images-change", "images removed, truncated or replaced in mid-run", "`error`: ended, the image named, and on "
        "with it when it is back; `skip`: others stand in, the same ones on another number of ranks", 40, one,
        ranks=True, cost_s=4)
]  # fmt: skip

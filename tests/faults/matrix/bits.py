"""Bits flipped in files, in process: found and named, or known to change nothing."""

from __future__ import annotations

import functools
import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import runs
from core import Injection, Row, hold

from hpc_lbsgd.amend import checked
from hpc_lbsgd.data import pack, stage, tree
from hpc_lbsgd.data.decode import pixels
from hpc_lbsgd.data.manifest import FILE_NAME, Manifest
from hpc_lbsgd.data.storage import open_storage
from hpc_lbsgd.data.verify import ODD, verify
from hpc_lbsgd.errors import RequestError, RunError
from hpc_lbsgd.records import RunFolder, cut_metrics, read_metrics
from hpc_lbsgd.report import facts as reading
from hpc_lbsgd.report.watch import Live
from hpc_lbsgd.train import checkpoint

PER_SEED = 10  # injections of one seed, on copies of one set of files


def flip(path: Path, rng: random.Random, span: tuple[int, int] | None = None) -> str:
    """One bit of a file; returns where."""
    content = bytearray(path.read_bytes())
    place, bit = rng.randrange(*(span or (0, len(content)))), rng.randrange(8)
    content[place] ^= 1 << bit
    path.write_bytes(content)
    return f"bit {bit} of byte {place} of {path.name} ({len(content)} bytes)"


@functools.cache
def finished_run() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="faults-bits-run-"))
    runs.finished(1, runs.recipe(folder), folder / "run", "--set", "train.max_steps=12")
    return folder / "run"


@functools.cache
def sets() -> dict[str, Path]:
    """An image tree, a set of shards packed from it, and a staged copy of that."""
    from conftest import write_images

    folder = Path(tempfile.mkdtemp(prefix="faults-bits-data-"))
    tree.index(write_images(folder / "images", 24, 8), processes=1)
    pack.pack(folder / "images", folder / "packed", pack.Encoding(), 0.02, 1)
    stage.stage(Manifest(folder / "packed" / FILE_NAME), folder / "staged")
    return {"images": folder / "images", "packed": folder / "packed", "staged": folder / "staged"}


def _checkpoint(rng: random.Random, folder: Path) -> Injection:
    run = shutil.copytree(finished_run(), folder / "run")
    steps = checkpoint.steps_there(run / "checkpoints")
    newest = run / "checkpoints" / checkpoint.name_of(steps[-1])
    victim = newest / rng.choice(sorted(p.name for p in newest.iterdir()))
    whole = {p.name: p.read_bytes() for p in newest.iterdir()}
    where = flip(victim, rng)
    begun = time.monotonic()
    path, state, problems = checkpoint.find_newest(RunFolder(run))
    if path == newest:  # what a flipped bit left legible must say the same; but it must never be another state
        hold(victim.name == "state.json", f"{where}: taken for whole")
        hold(vars(state) == json.loads(whole["state.json"]), f"{where}: another state was read")
        return Injection(where, "means the same", time.monotonic() - begun, 0)
    hold(path.name == checkpoint.name_of(steps[-2]) and problems, f"{where}: {path}")
    return Injection(where, "passed over, the one before is taken", time.monotonic() - begun, 3, problems[0])


def _manifest(rng: random.Random, folder: Path) -> Injection:
    return _set(rng, folder, "images", FILE_NAME)


def _index(rng: random.Random, folder: Path) -> Injection:
    return _set(rng, folder, "packed", FILE_NAME)


def _shard(rng: random.Random, folder: Path) -> Injection:
    return _set(rng, folder, "packed", "*.tar")


def found_by_verify(root: Path) -> list[str]:
    return [f"{f.path}: {f.kind}, {f.detail}" for f in verify(root, processes=1).findings if f.kind not in ODD]


def _content(found: Manifest) -> tuple:
    storage = open_storage(found)
    samples = [(found.key(i), int(found.labels[i]), storage.content(i).tobytes()) for i in range(len(found))]
    return found.fingerprint, found.classes, samples


def _set(rng: random.Random, folder: Path, name: str, pattern: str) -> Injection:
    """Opened, checked at a start, or found by `data verify`; never other samples in silence."""
    root = shutil.copytree(sets()[name], folder / name)
    before = _content(Manifest(root / FILE_NAME))
    where = flip(rng.choice(sorted(root.glob(pattern))), rng)
    begun = time.monotonic()
    try:
        found = Manifest(root / FILE_NAME)
        found.check_files()
        at_start = _content(found)
    except (RequestError, RunError) as problem:
        return Injection(where, "refused at the start", time.monotonic() - begun, 0, str(problem))
    if at_start == before:
        return Injection(where, "means the same", time.monotonic() - begun, 0)
    try:
        problems = found_by_verify(root)
    except (RequestError, RunError) as problem:
        problems = [str(problem)]
    hold(problems, f"{where}: other samples, and neither a start nor verify says so")
    return Injection(where, "named by data verify", time.monotonic() - begun, 0, str(problems)[:200])


def _staged(rng: random.Random, folder: Path) -> Injection:
    root = shutil.copytree(sets()["packed"], folder / "packed")
    source = Manifest(root / FILE_NAME)
    before = _content(source)
    copy = stage.stage(source, folder / "staged")
    victim = rng.choice(sorted(p for p in copy.path.parent.iterdir() if p.name != "lock"))
    where = flip(victim, rng)
    begun = time.monotonic()
    try:
        again = stage.stage(source, folder / "staged")
        content = _content(again)
    except (RequestError, RunError) as problem:
        return Injection(where, "refused", time.monotonic() - begun, 0, str(problem))
    hold(content[0] == before[0] and content[2] == before[2], f"{where}: other samples")
    return Injection(where, "copied again", time.monotonic() - begun, 0)


def _shipped(rng: random.Random, folder: Path) -> Injection:
    """A shard that was damaged before it is staged."""
    root = shutil.copytree(sets()["packed"], folder / "packed")
    where = flip(rng.choice(sorted(root.glob("*.tar"))), rng)
    begun = time.monotonic()
    try:
        stage.stage(Manifest(root / FILE_NAME), folder / "staged")
    except RunError as problem:
        return Injection(where, "refused while it is staged", time.monotonic() - begun, 0, str(problem))
    raise AssertionError(f"{where}: staged")


def _image(rng: random.Random, folder: Path) -> Injection:
    """verify names the file; a loader either cannot decode it, or the bit is one that no decoder reads."""
    root = shutil.copytree(sets()["images"], folder / "images")
    found = Manifest(root / FILE_NAME)
    index = rng.randrange(len(found))
    before = pixels(Path(found.file(index)).read_bytes(), 1)
    where = flip(Path(found.file(index)), rng)
    begun = time.monotonic()
    problems = found_by_verify(root)
    hold(problems and found.key(index) in str(problems), f"{where}: not named by verify: {problems}")
    try:
        same = np.array_equal(before, pixels(Path(found.file(index)).read_bytes(), 1))
        seen = "the same pixels" if same else "other pixels"
    except ValueError:
        seen = "not decoded"
    return Injection(where, f"named by data verify ({seen})", time.monotonic() - begun, 0, str(problems)[:200])


def _metrics(rng: random.Random, folder: Path) -> Injection:
    """At most the record that has the bit is lost, and what reads the file goes on."""
    run = shutil.copytree(finished_run(), folder / "run")
    before = list(read_metrics(run / "metrics.jsonl"))
    where = flip(run / "metrics.jsonl", rng)
    begun = time.monotonic()
    after = list(read_metrics(run / "metrics.jsonl"))
    lost = [r for r in before if r not in after]
    # a newline that became another byte joins two records
    hold(len(lost) <= 2 and len(after) >= len(before) - 2, f"{where}: {len(lost)} records lost")
    reading.facts(str(run))
    live = Live(RunFolder(run))
    live.look()
    live.facts()
    cut_metrics(RunFolder(run), 6)
    steps = [r.get("step") for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "step"]
    hold(set(steps) - set(range(6)) <= {r.get("step") for r in after if r not in before}, f"{where}: {steps}")
    took = time.monotonic() - begun
    if rng.random() < 0.1:  # a resume reads it too
        runs.finished(1, runs.recipe(folder), run, "--resume", "--set", f"train.max_steps={rng.randint(13, 18)}")
    return Injection(where, f"{len(lost)} records of {len(before)} lost", took, 0)


def _cut_metrics(rng: random.Random, folder: Path) -> Injection:
    """A kill in mid-line, at any byte."""
    run = shutil.copytree(finished_run(), folder / "run")
    content = (run / "metrics.jsonl").read_bytes()
    place = rng.randrange(len(content))
    (run / "metrics.jsonl").write_bytes(content[:place])
    begun = time.monotonic()
    whole = content[:place].count(b"\n")
    found = list(read_metrics(run / "metrics.jsonl"))
    complete = place and content[place : place + 1] == b"\n"  # all but its newline
    hold(len(found) == whole + complete, f"cut at byte {place}: {len(found)} of {whole}")
    cut_metrics(RunFolder(run), 3)
    hold((run / "metrics.jsonl").read_bytes().endswith((b"}\n", b"")), f"cut at byte {place}")
    return Injection(f"cut at byte {place} of {len(content)}", "the half line is left out", time.monotonic() - begun, 0)


def _small_file(rng: random.Random, folder: Path) -> Injection:
    """recipe.yaml, status.json, environment.json, preflight.json, amendments.json, LATEST, owner.json of a run."""
    from hpc_lbsgd.owner import check, take
    from hpc_lbsgd.recipe import load_resolved

    run = RunFolder(shutil.copytree(finished_run(), folder / "run"))
    run.write_amendments([[3, {"optim.base_lr": 0.05}]])
    small = ["recipe.yaml", "status.json", "environment.json", "amendments.json", "checkpoints/LATEST", "owner.json"]
    victim = rng.choice(small)
    held = take(run.path) if victim == "owner.json" else None
    where = flip(run.path / victim, rng)
    begun = time.monotonic()
    try:
        load_resolved(run.recipe)
        checked(run.read_amendments(), str(run.amendments))
        for look in (run.status, run.starts, run.newest_step, lambda: check(run.path)):
            look()
    except RequestError as problem:
        return Injection(where, "refused by name", time.monotonic() - begun, 0, str(problem))
    finally:
        if held:
            held.release()
    hold(held is None, f"{where}: a second start may take the folder of a live one")
    return Injection(where, "legible", time.monotonic() - begun, 0)


def many(act: Callable) -> Callable:
    def run(rng: random.Random, folder: Path) -> Iterator[Injection]:
        for number in range(PER_SEED):
            place = folder / str(number)
            place.mkdir()
            yield act(rng, place)
            shutil.rmtree(place)

    return run


def _row(name: str, what: str, must: str, count: int, act: Callable) -> Row:
    return Row(f"bits-{name}", f"one bit flipped in {what}", must, count, many(act))


ROWS = [
    _row("checkpoint", "a file of the newest checkpoint", "passed over, the one before is taken", 60, _checkpoint),
    _row("manifest", "the manifest of an image tree", "refused, or named by `data verify`", 40, _manifest),
    _row("index", "the index of a packed set", "refused, or named by `data verify`", 40, _index),
    _row("shard", "a shard", "named by `data verify`", 40, _shard),
    _row("shard-staged", "a shard before it is staged", "not staged, named", 30, _shipped),
    _row("staged", "a staged copy", "copied again, or refused; never other bytes", 40, _staged),
    _row("image", "an image file", "named by `data verify`", 30, _image),
    _row("metrics", "metrics.jsonl", "no other record is lost", 40, _metrics),
    Row("cut-metrics", "metrics.jsonl cut at a byte", "all whole lines are read", 30, many(_cut_metrics)),
    _row("small-files", "a small file of the run folder", "refused by name, or legible", 40, _small_file),
]  # fmt: skip

"""What all tests share: small real image data, a small recipe, and ways to run commands and ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # these tests are of CPUs, with more ranks than there are GPUs
if "PYTEST_XDIST_WORKER" in os.environ:  # processes side by side: a core each, or their threads wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # a thread whose partner has no core would keep the core it has

import hypothesis
import numpy as np
import pytest
import warm
import yaml
from warm_python import LAUNCH

hypothesis.settings.register_profile("no test is a matter of seconds", deadline=None)
hypothesis.settings.load_profile("no test is a matter of seconds")

if os.geteuid() == 0:  # Open MPI refuses root; containers and CI have no other user
    os.environ.setdefault("OMPI_ALLOW_RUN_AS_ROOT", "1")
    os.environ.setdefault("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")

LIMIT_S = 500.0  # of whatever a test starts: where others have the cores, all takes many times as long
CLASSES = 4
SAMPLES = 203  # with k*n = 128 or 24: the tail has full workers, a short one and empty ones


def write_images(
    root: Path, samples: int, size: int, classes: int = CLASSES, suffix: str = ".png", seed: int = 0
) -> Path:
    """`samples` pictures in class folders; what a class looks like can be learnt, each sample is its own."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    prototypes = np.random.default_rng(99).uniform(0, 255, (classes, 4, 4))
    for i in range(samples):
        label = i % classes
        coarse = prototypes[label] + rng.normal(0, 60, (4, 4))
        image = Image.fromarray(np.clip(coarse, 0, 255).astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
        folder = root / f"class-{label}"
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{i:04d}{suffix}")
    return root


SMALL_RECIPE = {
    "seed": 7,
    "data": {"channels": 1, "image_size": 8, "augment": "pad-crop", "crop_padding": 2, "eval_resize": 0,
             "mean": [127.0], "std": [60.0], "loader": "torchvision"},
    "model": {"name": "resnet8", "widths": [16, 16, 16], "dropout": 0.2, "zero_gamma": False},
    "batch": {"samples_per_worker": 8, "workers": 16, "bn_group": 4, "last_batch": "partial"},
    "optim": {"base_lr": 0.2, "base_batch": 128, "weight_decay": 1e-3},
    "schedule": {"kind": "cosine", "warmup_epochs": 1, "warmup_start_lr": 0.05},
    "train": {"epochs": 10, "max_steps": 20},
    "machine": {"prefetch": 2, "threads": 1},
}  # fmt: skip


def changed(recipe: dict, **changes) -> dict:
    """A copy with dotted keys changed: changed(r, batch__workers=3)."""
    copy = json.loads(json.dumps(recipe))
    for key, value in changes.items():
        *sections, last = key.split("__")
        place = copy
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return copy


def write_environment(folder: Path) -> Path:
    """A small one, which finds torch and the like in that of the tests, and this package as `pip -e` has it."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python3*/site-packages")
    paths = [str(Path(__file__).parents[1]), *(p for p in sys.path if p.endswith("site-packages"))]
    (packages / "others.pth").write_text("\n".join(paths) + "\n")
    return folder


@pytest.fixture(scope="session")
def small_data(tmp_path_factory) -> Path:
    """DIR/train (203 pictures of 8x8) and DIR/eval (61), indexed."""
    from hpc_lbsgd.data import tree as trees

    root = tmp_path_factory.mktemp("data")
    for part, samples, seed in (("train", SAMPLES, 1), ("eval", 61, 2)):
        trees.index(write_images(root / part, samples, 8, seed=seed), processes=1)
    return root


@pytest.fixture(scope="session")
def small_recipe(small_data) -> dict:
    return changed(SMALL_RECIPE, data__train=str(small_data / "train"), data__eval=str(small_data / "eval"))


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """A real Slurm of 32 nodes (tests/lab.py); skipped, with the reason, where it cannot be."""
    import lab as labs

    reason = labs.why_not()
    if reason:
        pytest.skip(reason)
    running = labs.start(tmp_path_factory.getbasetemp())
    yield running
    running.stop()


@pytest.fixture(scope="module")
def world():
    """The library's, of this process alone. What it settles for a process is as before afterwards."""
    import torch

    import hpc_lbsgd as lb

    threads, debug = torch.get_num_threads(), torch.get_deterministic_debug_mode()
    yield lb.init("torch")
    lb.close()
    torch.set_num_threads(threads)
    torch.set_deterministic_debug_mode(debug)


def write_recipe(path: Path, recipe: dict) -> Path:
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(scope="module")
def one_thread():
    """For pictures as small as these: threads would wait for one another longer than they compute."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def command(
    *words, timeout: float = LIMIT_S, env: dict | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess:
    """Run `hpc-lbsgd WORDS` to its end. env: changes; cold, where they say what Python finds."""
    cold = env and "PYTHONPATH" in env
    python = [sys.executable] if cold else warm.python(3 if str(words[0]) in LAUNCH else 1)
    return subprocess.run(
        [*python, "-m", "hpc_lbsgd.cli", *map(str, words)],
        capture_output=True, text=True, timeout=timeout, cwd=cwd, env={**os.environ, **(env or {})},
    )  # fmt: skip


def alone(*program, timeout: float = LIMIT_S) -> subprocess.CompletedProcess:
    """Run a Python program without a launcher to its end."""
    return subprocess.run([*warm.python(), *map(str, program)], capture_output=True, text=True, timeout=timeout)


def mpirun_line(ranks: int, *program, python: list[str] | None = None) -> list[str]:
    from hpc_lbsgd.parallel.launchers import find_mpirun

    start = [find_mpirun(), "-np", str(ranks), "--oversubscribe", "--bind-to", "none"]
    return [*start, *(python or [sys.executable]), *map(str, program)]


def mpirun(ranks: int, *program, timeout: float = LIMIT_S, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """Run a Python program on real ranks to its end."""
    line = mpirun_line(ranks, *program, python=warm.python(ranks))
    return subprocess.run(line, capture_output=True, text=True, timeout=timeout, cwd=cwd)


def train_on(ranks: int, recipe: Path, run: Path, *more, timeout: float = LIMIT_S) -> subprocess.CompletedProcess:
    """`train` under mpirun, as a user without `launch` would start it."""
    return mpirun(ranks, "-m", "hpc_lbsgd.cli", "train", recipe, "--run", run, *more, timeout=timeout)


def train_many(
    ranks: int,
    recipes: dict[str, dict],
    root: Path,
    timeout: float = LIMIT_S,
    resume: str | None = None,
    amend: tuple[str, ...] = (),
    refused: tuple[str, ...] = (),
) -> dict[str, Path]:
    """Train all of {name: recipe} one after another on the same ranks; returns {name: run folder}. refused: what is
    said, where none is to start.

    The engine is started for the first: what it reads once (HOROVOD_FUSION_THRESHOLD) holds for all.
    """
    runs = {name: root / f"{name}-on-{ranks}" for name in recipes}
    listed = [
        [str(write_recipe(root / f"{run.name}.yaml", recipe)), str(run), resume, list(amend)]
        for run, recipe in zip(runs.values(), recipes.values(), strict=True)
    ]
    jobs = root / f"jobs-{next(iter(recipes))}-on-{ranks}.json"
    jobs.write_text(json.dumps(listed))
    result = mpirun(ranks, "tests/mpi/many.py", jobs, timeout=timeout)
    code = 2 if refused else 0
    assert result.returncode == code and f"codes {[code] * len(listed)}" in result.stdout, result.stdout + result.stderr
    assert all(said in result.stderr for said in refused), result.stderr
    return runs


def records(run: Path, kind: str) -> list[dict]:
    from hpc_lbsgd.records import read_metrics

    return [r for r in read_metrics(run / "metrics.jsonl") if r["kind"] == kind]

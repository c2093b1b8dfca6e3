"""What answers at once does not load what takes seconds: torch, Horovod and DALI are imported where they are used."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SLOW = ("torch", "torchvision", "horovod", "nvidia", "matplotlib", "mpi4py", "tensorboard")
# modules and packages that are about tensors: they import torch at their top. Nothing else does, not even indirectly.
WITH_TORCH = (
    "hpc_lbsgd.api",
    "hpc_lbsgd.train",
    "hpc_lbsgd.trained.audit",
    "hpc_lbsgd.trained.evaluate",
    "hpc_lbsgd.trained.export",
    "hpc_lbsgd.trained.opened",
    "hpc_lbsgd.trained.predict",
    "hpc_lbsgd.parallel.buckets",
    "hpc_lbsgd.parallel.ddp_engine",
    "hpc_lbsgd.parallel.engine",
    "hpc_lbsgd.parallel.fixed_point",
    "hpc_lbsgd.parallel.horovod_engine",
    "hpc_lbsgd.parallel.cpu_kernels",
    "hpc_lbsgd.parallel.kernels",
    "hpc_lbsgd.parallel.layout",
    "hpc_lbsgd.parallel.scales",
    "hpc_lbsgd.parallel.torch_engine",
    "hpc_lbsgd.data.bounded",
    "hpc_lbsgd.data.dali",
    "hpc_lbsgd.data.encoders",
    "hpc_lbsgd.data.finish",
    "hpc_lbsgd.data.foreseen",
    "hpc_lbsgd.data.loader",
    "hpc_lbsgd.data.maker",
    "hpc_lbsgd.data.own",
    "hpc_lbsgd.data.place",
    "hpc_lbsgd.data.show",
    "hpc_lbsgd.data.source",
    "hpc_lbsgd.data.targets",
    "hpc_lbsgd.data.torchvision",
    "hpc_lbsgd.data.user",
    "hpc_lbsgd.data.user_loader",
    "hpc_lbsgd.bench.core.pictures",
    "hpc_lbsgd.bench.core.timing",
    "hpc_lbsgd.bench.checkpoint.measure",
    "hpc_lbsgd.bench.checkpoint.run",
    "hpc_lbsgd.bench.loader.ffcv",
    "hpc_lbsgd.bench.loader.measure",
    "hpc_lbsgd.bench.loader.peers",
    "hpc_lbsgd.bench.loader.run",
    "hpc_lbsgd.bench.loader.streaming",
    "hpc_lbsgd.bench.loader.webdataset",
    "hpc_lbsgd.bench.rates.run",
    "hpc_lbsgd.bench.scaling.measure",
    "hpc_lbsgd.bench.step.measure",
    "hpc_lbsgd.bench.step.ways",
)

COMMAND = """
import json, sys
from hpc_lbsgd import cli
try:
    code = cli.main(sys.argv[1:])
except SystemExit as end:
    code = end.code
sys.stderr.write(json.dumps([code, sorted(sys.modules)]))
"""

EACH = """
import importlib, json, sys
slow, modules = json.loads(sys.argv[1])
sys.modules.update(dict.fromkeys(slow))  # importing them fails, whoever has imported them before
found = {}
for module in modules:
    try:
        importlib.import_module(module)
    except ImportError as problem:
        found[module] = problem.name
print(json.dumps(found))
"""


def python(code: str, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60, check=True)


@pytest.mark.parametrize(
    "words, most_modules",
    [
        (["--help"], 250),  # were 127, most of them Python's own
        (["bench", "step", "--help"], 250),
        (["plan", "goyal-resnet50"], 1000),  # it looks for GPUs, and at the runs that are here
        (["plan", "goyal-resnet50", "--nodes", "32"], 1000),
        (["plan", "smith-imagenet-m90", "--nodes", "4", "--system", "a100-hdr"], 1000),
        (["bench", "simulate", "--preset", "a100-hdr"], 1000),
    ],
)
def test_commands_that_only_reckon_load_little(words, most_modules):
    code, modules = json.loads(python(COMMAND, *words).stderr)
    assert code == 0 and len(modules) < most_modules
    assert not {name.split(".")[0] for name in modules} & set(SLOW)


def test_only_what_is_about_tensors_imports_torch_at_its_top():
    """And what is listed for it does; of a package that is listed, some module."""
    paths = (p.relative_to(ROOT).with_suffix("") for p in (ROOT / "hpc_lbsgd").rglob("*.py"))
    modules = sorted(".".join(p.parts).removesuffix(".__init__") for p in paths)
    slow = ("torch", "horovod", "nvidia")
    needed = json.loads(python(EACH, json.dumps([slow, modules])).stdout)
    assert len(modules) > 150 and {name.split(".")[0] for name in needed.values()} <= set(slow)
    of = {m: next((name for name in WITH_TORCH if f"{m}.".startswith(f"{name}.")), None) for m in needed}
    assert [module for module, listed in of.items() if listed is None] == []
    assert set(WITH_TORCH) - set(of.values()) == set()


RANK = """
import json, sys
from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.train import job
import torch
job.prepare_process(recipes.read("fashion-mnist", ["determinism=any-ranks"]))
compiler = "torch._dynamo" in sys.modules
import torch._inductor.config as inductor
print(json.dumps([compiler, torch.are_deterministic_algorithms_enabled(), inductor.deterministic]))
"""


def test_a_rank_does_not_load_torchs_compiler():
    """One to two seconds of every rank's start, for nothing where nothing is compiled. Where it is, it is told."""
    assert json.loads(python(RANK).stdout) == [False, True, True]


COLLECTOR = """
import gc
from hpc_lbsgd.train.laps import Laps, kept_for_good
laps = Laps()
with kept_for_good():
    import torch
laps.end("imports")
print(gc.isenabled(), gc.get_freeze_count() > 100_000, laps.parts["imports"] > 0.1)
"""


def test_what_is_imported_at_the_start_is_not_collected_again_and_again():
    assert python(COLLECTOR).stdout.split() == ["True"] * 3

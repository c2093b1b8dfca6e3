"""The library: `import hpc_lbsgd as lb`, for training scripts of one's own (docs/api.md).

world.py       where this process is among all ranks
schedule.py    a schedule from keywords or a recipe
shuffle.py     whose samples come when: a batch sampler, and steps of parts
loader.py      the trainer's loader, over a manifest
keyed.py       random transforms that do not depend on who draws
fit.py         what can be distributed, and that all ranks ask for the same
watch.py       what a script may not change behind a run
verdict.py     what every rank knows after a step's sum
run.py         a model and an optimizer under the trainer's buckets and virtual workers
measure.py     evaluation over all ranks
noise.py       the gradient's noise scale
state.py       save and load; result_part.py: what steps that go on must be of

May be imported by: nothing.
May import: train, parallel, data, recipe, sections, reading, records, theory, errors.
"""

from hpc_lbsgd.api.keyed import Keyed
from hpc_lbsgd.api.loader import Loader
from hpc_lbsgd.api.measure import evaluate
from hpc_lbsgd.api.noise import NoiseScale
from hpc_lbsgd.api.run import Run, distribute
from hpc_lbsgd.api.schedule import Schedule
from hpc_lbsgd.api.shuffle import GlobalShuffle, Part, Step
from hpc_lbsgd.api.state import load, save
from hpc_lbsgd.api.verdict import Verdict
from hpc_lbsgd.api.world import World, close, init
from hpc_lbsgd.errors import RequestError, RunError
from hpc_lbsgd.theory.schedule import Stage

__all__ = [
    "GlobalShuffle",
    "Keyed",
    "Loader",
    "NoiseScale",
    "Part",
    "RequestError",
    "Run",
    "RunError",
    "Schedule",
    "Stage",
    "Step",
    "Verdict",
    "World",
    "close",
    "distribute",
    "evaluate",
    "init",
    "load",
    "save",
]

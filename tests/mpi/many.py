"""Run under mpirun: train several recipes one after another in the same ranks (starting Python is the slow part).

    many.py JOBS.json     [[recipe file, run folder, resume, amend], ...]; resume, amend: as `train` takes them

Horovod does not survive a second init in one process, so all runs share one engine.
"""

import json
import sys
from pathlib import Path

from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.amend import of_request
from hpc_lbsgd.train.laps import kept_for_good

with kept_for_good():
    import torch

    from hpc_lbsgd.parallel import engine as engines
    from hpc_lbsgd.train.job import train

jobs = [
    (recipes.read(path), run, resume, of_request(amend, resume))
    for path, run, resume, amend in json.loads(Path(sys.argv[1]).read_text())
]
engine = engines.create(jobs[0][0].machine, jobs[0][0].determinism, torch.device("cpu"))
close, engine.close = engine.close, lambda: None
engines.create = lambda *args: engine
codes = [train("job", recipe, run, resume, amend=amend) for recipe, run, resume, amend in jobs]
if engine.rank == 0:
    print("codes", codes)
close()
sys.exit(max(codes))

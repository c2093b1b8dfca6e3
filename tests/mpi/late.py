"""Run under mpirun: many.py, on CPUs that read steps late, as GPUs are read, with runs that stop by themselves.

late.py JOBS.json     as many.py. Runs in a folder `at-once` read at once. One named `stop-N` is asked to stop
                      while step N computes, if it is not a resume
"""

import re
import runpy
from itertools import count
from pathlib import Path

from hpc_lbsgd.train.laps import kept_for_good

with kept_for_good():
    import torch  # noqa: F401

    from hpc_lbsgd.train import step, stops

late = dict.fromkeys((True, False), 0)
may_wait, watch = step.Stepper._may_wait, stops.Stops.watch


def counted(self, under_way):
    late[may_wait(self, under_way)] += 1
    return may_wait(self, under_way)


def watched(self, folder, lead):
    watch(self, folder, lead)
    step.AT_ONCE = AT_ONCE if folder.path.parent.name == "at-once" else ()
    asked, steps = re.fullmatch(r"stop-(\d+)", folder.path.name), count()
    if asked and not (folder.checkpoints / "LATEST").exists():
        self.asked = lambda: next(steps) >= int(asked[1])


AT_ONCE, step.Stepper._may_wait, stops.Stops.watch = step.AT_ONCE, counted, watched
try:
    runpy.run_path(str(Path(__file__).with_name("many.py")), run_name="__main__")
finally:
    print("late", late[True], "at once", late[False])

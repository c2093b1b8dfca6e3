"""Put on PYTHONPATH: a machine that has neither Horovod nor mpi4py, and so no mpirun that ranks could meet through."""

import sys


class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("horovod", "mpi4py"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Absent())

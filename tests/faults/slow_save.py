"""Run under mpirun: `train` on a file system that takes SECONDS for each checkpoint.

slow_save.py SECONDS train RECIPE ...
"""

import sys
import time

from hpc_lbsgd import cli
from hpc_lbsgd.train import checkpoint

write = checkpoint.write_atomically


def slowly(path, content):
    if path.name == "state.json":
        time.sleep(float(sys.argv[1]))
    write(path, content)


checkpoint.write_atomically = slowly
sys.exit(cli.main(sys.argv[2:]))

"""`python -m hpc_lbsgd`: the command line, where no `hpc-lbsgd` is on the path."""

import sys

from hpc_lbsgd.cli import main

if __name__ == "__main__":
    sys.exit(main())

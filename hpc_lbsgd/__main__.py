"""`python -m hpc_lbsgd`: the command line, where no `hpc-lbsgd` is on the path."""

from hpc_lbsgd.cli import run

if __name__ == "__main__":
    run()

"""The parts of tools/build_horovod.py, which says what is built and how it is called.

missing.py     what stops a build before it starts
nvcc.py        the CUDA compiler that fits torch
processes.py   commands, short and long
source.py      Horovod's source, and what is edited in it
toolchain.py   what this environment has to build with, and what a binary depends on
wheel.py       the build, and the cache of wheels

For: build_horovod.py. Runs before hpc_lbsgd and what it needs are installed: the standard library alone.
"""

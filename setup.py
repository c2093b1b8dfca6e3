"""The part of the package that is compiled; all else stands in setup.cfg."""

from setuptools import Extension, setup

# A plain C library, no Python module: any C compiler makes it, without Python's or torch's headers. optional: where
# there is none, torch's operations do the same, to the same bits. Traps and errno are what keeps GCC from vectors.
FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math"]
NAME = "hpc_lbsgd.parallel._cpu_kernels"
setup(ext_modules=[Extension(NAME, ["hpc_lbsgd/parallel/cpu_kernels.c"], extra_compile_args=FLAGS, optional=True)])

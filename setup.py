"""The part of the package that is compiled; all else stands in setup.cfg."""

from hashlib import blake2b
from pathlib import Path

from setuptools import Extension, setup

SOURCE = "hpc_lbsgd/parallel/cpu_kernels.c"

# A plain C library, no Python module: any C compiler makes it, without Python's or torch's headers. optional: where
# there is none, torch's operations do the same, to the same bits. Traps and errno are what keeps GCC from vectors. What
# a user's CFLAGS say of fast mathematics is taken back, of the linker too: it would have a process without subnormals.
FLAGS = ["-O3", "-fno-fast-math", "-fno-unsafe-math-optimizations", "-fno-math-errno", "-fno-trapping-math"]
setup(
    options={"build_ext": {"force": True}},  # a file that came with its time may be older than what was made of another
    ext_modules=[
        Extension(
            "hpc_lbsgd.parallel._cpu_kernels",
            [SOURCE],
            define_macros=[("SOURCE", "0x" + blake2b(Path(SOURCE).read_bytes(), digest_size=8).hexdigest())],
            extra_compile_args=FLAGS,
            extra_link_args=FLAGS,
            libraries=["m"],
            optional=True,
        )
    ],
)

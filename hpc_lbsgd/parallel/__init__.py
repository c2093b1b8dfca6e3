"""Ranks: the engine seam, its engines, and gradients in flat buckets.

engine.py      what an engine promises, and the choice of one; *_engine.py are the engines, each alone with its library
buckets.py     gradients and weights as views of a few flat buffers (layout.py), each summed as soon as it is full;
fixed_point.py sums as whole numbers; scales.py: their units in int32; in one pass: kernels.py on GPUs, cpu_kernels.py
compiler.py    is torch's compiler at work here; gpus.py: GPUs that there are, and that torch cannot use
agree.py       one verdict for all ranks
world.py       what a rank can know before MPI starts; launchers.py: what each mpirun wants to be told;
               refusals.py: what one says where it starts nothing, in a line

May be imported by: train, bench, reproduce, here, plan, cluster, trained, api, complaints, cli.
May import: sections, recipe, schedulers, theory, errors.
"""

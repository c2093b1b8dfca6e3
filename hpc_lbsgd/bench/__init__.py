"""Benchmarks: what a step, its sum over ranks and its data cost here, and what more nodes would do.

A package a benchmark: loader, rates, step, allreduce, checkpoint, scaling, simulate. Each has, as far as it applies,

command.py   flags, the call, the printing
run.py       who takes part, how they take turns, and what their rounds say together
measure.py   what one rank or process measures; started by run.py's launches as `python -m`, TASK in, a file out
show.py      tables and plots, from what run.py returns

core/ is what they share. A new benchmark is a package here, and a name in commands.py. Packages of benchmarks do not
import one another, core/ imports none of them; only command.py is loaded before a command is chosen.

May be imported by: plan, cluster, cli.
May import: report, train, parallel, data, recipe, records, arguments, schedulers, yaml12, theory, progress,
origin, errors.
"""

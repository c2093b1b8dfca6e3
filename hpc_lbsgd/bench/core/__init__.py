"""What benchmarks have in common.

launches.py   contenders that mpirun starts in turn, their environment, and how a launch ends
turns.py      who goes when
spread.py     medians with their lowest and highest; ratios taken round by round
output.py     a result as JSON or for a person, and drawn; fit.py: tables as wide as a terminal
task.py       the training that is timed where no recipe is named
pictures.py   synthetic pictures
timing.py     a recipe's step with batches in memory, its loader alone, and both together, on the ranks of a job

It knows none of the benchmarks. pictures.py and timing.py load torch, the others do not.

May be imported by: loader, rates, step, allreduce, scaling, simulate, checkpoint.
May import: report, train, parallel, data, recipe, theory, progress, origin, errors.
"""

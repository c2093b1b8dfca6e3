"""`bench rates`: a recipe's step on batches in memory, its loader alone, and both together, on the ranks of a job.

What is measured is core/timing.py, which `bench scaling` measures on many numbers of ranks.

May be imported by: commands.
May import: core, train, parallel, recipe, arguments, progress, errors.
"""

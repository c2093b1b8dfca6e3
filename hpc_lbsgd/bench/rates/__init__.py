"""`bench rates`: a recipe's step on batches in memory, its loader alone, and both together, on the ranks of a job.

For: the command line. What is measured is core/timing.py, which `bench scaling` measures on many numbers of ranks.
Imports core, train and all below.
"""

"""`bench scaling`: weak and strong scaling of a recipe's step, by mpirun here or as jobs of a Slurm sweep.

results.py is the folder that launches leave their results in, and what they say together.

For: the command line, and cluster/submit.py, whose sweep it checks and reports on (run.py, results.py). Imports core,
train and all below; only measure.py torch.
"""

"""`bench scaling`: weak and strong scaling of a recipe's step, by mpirun here or as batch jobs of a sweep.

results.py is the folder that launches leave their results in, and what they say together.

cluster/submission.py has its sweep checked and reported on by run.py and results.py. Only measure.py loads torch.

May be imported by: commands, cluster.
May import: core, report, train, parallel, recipe, records, arguments, progress, origin, errors.
"""

"""Batch systems: who starts jobs on a cluster.

scheduler.py   what one is to this program; what it says about a job; what it may lack
slurm.py, pbs.py, lsf.py, flux.py: a class each, and nothing else of the package has their words, but for the variables
               of ranks (parallel/world.py)
shell/         the same for a job's script: parts of bash that all templates are filled in with, by name
known.py       all of them, and the one that this process is a job of

May be imported by: cluster, report, train, parallel, bench, owner, lease.
May import: errors.
"""

"""Launchers at work, jobs, sites, and what a machine can do.

launch.py      an mpirun line, run and watched
submission.py  a recipe as Slurm jobs: jobs.py says which, script.py fills in templates/; sites.py and sites/: what a
               cluster needs said; suspects.py: nodes to go on without
doctor.py      what this machine can do, and the fix for what it cannot, as lines of finding.py's kind; on_ranks.py
               starts real ranks for it (check_ranks.py), on which mpi_check.py and node_check.py run

May be imported by: cli.
May import: bench, data, parallel, amend, recipe, arguments, sections, reading, runs, owner, records, signals, yaml12,
theory, progress, errors.
"""

"""Launchers at work, jobs, sites, and what a machine can do.

launch.py      an mpirun line, run and watched
submit.py      a recipe as Slurm jobs, from templates/; sites.py and sites/: what a cluster needs said
doctor.py      what this machine can do, and the fix for what it cannot, as lines of finding.py's kind; on_ranks.py
               starts real ranks for it (check_ranks.py), on which mpi_check.py and node_check.py run

May be imported by: cli.
May import: bench, data, parallel, amend, recipe, sections, reading, runs, owner, records, signals, yaml12, theory,
progress, errors.
"""

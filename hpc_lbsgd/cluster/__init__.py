"""Launchers at work, jobs, sites, and what a machine can do.

`from hpc_lbsgd.cluster import submit`, for notebooks and scripts: the job that it returns is in submitted.py.

launch.py      an mpirun line, run and watched
submission.py  a recipe as batch jobs: jobs.py says which, script.py fills in templates/, forecast.py says how far they
               will come; sites.py and sites/: what a cluster needs said; suspects.py: nodes to go on without
bundle.py      this environment in one file; unbundle.py: the same on a node's disk, where a job's ranks have it from
doctor.py      what this machine can do, and the fix for what it cannot, as lines of finding.py's kind; gpu_checks.py:
               of GPUs; on_ranks.py starts real ranks for it (check_ranks.py), on which mpi_check.py and node_check.py
               run

May be imported by: cli.
May import: bench, report, data, parallel, amend, recipe, arguments, sections, reading, runs, owner, schedulers,
records, signals, yaml12, theory, progress, private, origin, errors.
"""

API = ("SubmittedJob", "submit", "submit_array")


def __getattr__(name: str):
    if name in API:
        from hpc_lbsgd.cluster import submission

        return getattr(submission, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

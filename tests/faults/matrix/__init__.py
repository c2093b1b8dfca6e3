"""The fault matrix: every fault that a row of it names is injected at random moments, and what must hold is checked.

    make faults [PART=row] [SEED=n] [COUNT=n] [MINUTES=n]
    python tests/faults/matrix --list

core.py runs rows, __main__.py slices of them: a JSON line an injection; page.py makes docs/results/faults.md of them.
hurt.py is the injector (`fail_at`), a module such as a user's; forked.py starts ranks without paying for imports; in
spaces.py are namespaces. The rows: bits.py, fuzz.py and the first of disks.py in process; with real ranks deaths.py,
wrong.py, unlike.py, the rest of disks.py, owners.py, stops.py, images.py, network.py, and slurm_lab.py with jobs.
"""

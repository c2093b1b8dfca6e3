"""The fault matrix: every fault that a row of it names is injected at random moments, and what must hold is checked.

    make faults [PART=row] [SEED=n] [COUNT=n]
    python tests/faults/matrix --list

core.py runs rows and writes a JSON line an injection; page.py makes docs/results/faults.md of them. hurt.py is the
injector (`fail_at`), a module such as a user's; forked.py starts ranks without paying for imports. The rows:
bits.py in process; deaths.py, wrong.py, unlike.py with real ranks; fuzz.py.
"""

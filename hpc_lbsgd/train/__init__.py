"""The trainer.

job.py         one process of a job, to its exit code
trainer.py     a run on one rank: prepare, loop, end; sets.py: its data on each node
step.py        one step; control.py what all ranks know after it; replica.py what it changes; workers.py virtual
               workers, statistics.py ghost BatchNorm
preflight.py   is the promise kept by this model, data and machine; crosscheck.py: do ranks still agree
checkpoint.py  state that is written whole or not at all

May be imported by: report, bench, plan, plan_show, cluster, trained, api, cli.
May import: parallel, data, outline, amend, recipe, sections, runs, owner, schedulers, tail, records, signals,
imports, theory, progress, origin, urls, errors.
"""

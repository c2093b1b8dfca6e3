"""`bench simulate`: step time and efficiency on 1 to 4,096 nodes, predicted. Nothing is measured.

presets.py    published systems, every number with its source
workload.py   a model as layers; those of the shipped models are stored, so that no prediction need load torch
from_run.py   --from RUN: a measured run in place of a preset's numbers
calibrate.py  --calibrate, --against: the model held against results of `bench step`

plan.py predicts with run.py and workload.py; train is loaded where a model has to be built.

May be imported by: commands, plan.
May import: core, report, train, parallel, recipe, records, arguments, theory, errors.
"""

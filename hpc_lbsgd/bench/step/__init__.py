"""`bench step`: a training step of ours beside stock Horovod, DDP and one process, on synthetic pictures.

ways.py is what is compared: ours and the peers' own classes. tune/ searches machine keys with the same ranks.

What it prints as JSON is what `bench simulate --calibrate` reads. ways.py loads the peers: horovod, and torch's
DistributedDataParallel.

May be imported by: commands.
May import: core, report, train, parallel, data, recipe, arguments, schedulers, yaml12, theory,
errors.
"""

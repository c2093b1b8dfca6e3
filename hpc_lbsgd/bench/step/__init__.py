"""`bench step`: a training step of ours beside stock Horovod, DDP and one process, on synthetic pictures.

ways.py is what is compared: ours and the peers' own classes. tune/ searches machine keys with the same ranks.

For: the command line; what it prints as JSON is what `bench simulate --calibrate` reads. Imports core, train and all
below; ways.py the peers: horovod, and torch's DistributedDataParallel.
"""

"""What a run left, put to use: evaluate it on any data, predict images, hand its model to others.

opened.py      a run's model with the weights of one of its checkpoints
evaluate.py    loss and accuracy, as the run itself measures them
predict.py     classes of image files
export.py      the weights in other formats, each read back and compared
commands.py    their command lines

May be imported by: cli.
May import: train, parallel, data, amend, recipe, arguments, records, progress, urls, errors.
"""

"""The trainer: virtual workers, ghost BatchNorm, one step, checkpoints, evaluation."""

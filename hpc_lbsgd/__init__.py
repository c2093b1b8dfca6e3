"""Large-minibatch SGD on supercomputers: plan, submit, train, measure, report."""

__version__ = "0.1.0"

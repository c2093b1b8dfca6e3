"""Benchmarks: what a step and its allreduce cost here, and what more nodes would do."""

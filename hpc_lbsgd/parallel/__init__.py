"""Ranks: the engine seam, and gradients in flat buckets."""

"""Which samples there are, who gets which, and how they become tensors."""

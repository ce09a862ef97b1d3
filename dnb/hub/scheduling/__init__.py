"""The decisions on who computes what, and when a step counts: without I/O, clock or tensors."""

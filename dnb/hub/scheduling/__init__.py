"""Who computes what, and when a step counts: decisions without I/O, clock or tensors."""

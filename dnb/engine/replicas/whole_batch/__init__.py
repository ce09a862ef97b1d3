"""Outputs of all engines as one batch, for losses and metrics that look at the whole of it."""

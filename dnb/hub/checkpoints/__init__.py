"""Checkpoints: what they hold, how they are written, signed and read."""

"""Divisions of the user's model: modules that trace or run it, in the kernel and on engines."""

"""A run's first steps computed again in one process, and held against the run."""

"""A run's folder and its numbers: history, events, engine statistics, timelines."""

"""A run in words: pure functions."""

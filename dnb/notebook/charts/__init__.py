"""Figures from a run's history: pure functions."""

"""Layers divided over engines: which, by columns or rows, tried in one process."""

"""Pools: ipyparallel engines with a hub, started, found again, and ended without a trace."""

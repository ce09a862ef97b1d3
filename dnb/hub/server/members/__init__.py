"""Engines of a pool as its hub knows them: members, spares, heartbeats, ends, faults on purpose."""

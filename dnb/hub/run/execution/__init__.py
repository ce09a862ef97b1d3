"""Tasks of a run: leased to engines, reported, checked and committed as the coordinator decides."""

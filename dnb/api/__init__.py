"""Objects and functions that users hold; public are the names in `dnb/__init__.py` and `dnb.errors`, nothing else."""

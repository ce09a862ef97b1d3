"""The rows, one file per question."""

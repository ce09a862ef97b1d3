"""Completion of `%dtrain` lines, and of the names of dnb and of what users hold."""

"""Processes, files and process-wide settings, as the operating system has them."""

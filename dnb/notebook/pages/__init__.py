"""Runs and plans as HTML that needs no kernel."""

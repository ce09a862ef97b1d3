"""Widgets with code of their own that runs in the page."""

"""Measurements of a model and of the exchange between engines, for plans."""

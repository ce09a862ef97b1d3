"""Strategies of `fit`: how a model is divided, what an engine may hold, what has to be measured for it."""

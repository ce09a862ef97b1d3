"""Stages of a pipeline: a traced forward, its cuts, and a module for each stage."""

"""Computation of shards: the model whole, in stages, in divided layers, or with a gathered loss."""

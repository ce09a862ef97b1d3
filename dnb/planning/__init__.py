"""Pure arithmetic: samples, shards, capacity, checkpoints to keep; runs in every process, imports no torch."""

"""Pure arithmetic: which samples, in which shards, on which engines."""

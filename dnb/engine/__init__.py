"""The training side of every engine: a thread that computes shards while the main thread stays free."""

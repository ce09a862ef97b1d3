"""What runs in every engine: a thread that computes shards while the main thread stays free."""

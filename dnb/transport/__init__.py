"""Memory, sockets, pickles and system calls that hub, engines and kernel share; knows nothing of training."""

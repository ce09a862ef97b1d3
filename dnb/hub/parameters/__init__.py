"""The master copy of parameters and optimizer state, and its safety when a hub dies in an update."""

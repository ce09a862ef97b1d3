"""The rehearsal: a few samples of a run, computed in the notebook's own process before anything is shipped."""

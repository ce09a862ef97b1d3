"""The user's objects as they travel: pickles, their tensors beside them, and what pickle leaves out."""

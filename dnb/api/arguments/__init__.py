"""Arguments of `fit`: read, checked, and refused with the way out, before anything starts."""

"""A run as the user holds it, its folder and its exports; runs in the kernel."""

"""The search for a plan: costs, cuts, predictions; arithmetic on profiles, run in the kernel."""

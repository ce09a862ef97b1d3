"""The user's model, losses and metrics as every process calls them, and what these return."""

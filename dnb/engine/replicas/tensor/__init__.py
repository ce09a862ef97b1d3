"""An engine's part of layers that are divided over a team."""

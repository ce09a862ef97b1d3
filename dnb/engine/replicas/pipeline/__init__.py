"""An engine's stages of a model that is divided over a team, and the schedules they follow."""

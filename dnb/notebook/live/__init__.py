"""Views of a run that goes on, and how they get into a front end."""

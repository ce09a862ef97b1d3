"""The verbs of `%dtrain`."""

"""The hub's processes: the controller, the supervisor that starts the hub again, the fork server for engines."""

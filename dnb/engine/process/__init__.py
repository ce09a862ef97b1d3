"""An engine's process: its training thread, its session with the hub, its heartbeat."""

"""The hub's service: sockets, members, heartbeats, requests; hands a run's messages to `hub.run`."""

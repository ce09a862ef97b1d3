"""The means of a replica: memory shared with the hub, gradients in slabs, telemetry, process groups."""

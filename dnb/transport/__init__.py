"""What hub, engines and kernel share: memory, parcels, sockets."""

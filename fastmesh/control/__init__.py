"""What the data plane is told: names resolved, sockets bound, the configuration compiled into a
snapshot."""

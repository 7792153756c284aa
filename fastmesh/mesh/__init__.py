"""Registration, groups, scheduling and forwarding of the message mesh."""

"""The embedded broker: one node, for development, tests and the demo. See docs/broker.md."""

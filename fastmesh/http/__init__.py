"""The local HTTP server under every interface for people and programs: bounded, deny by default."""

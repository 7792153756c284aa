"""The local HTTP interface for probes, scrapers and operators: small, bounded, deny by default."""

"""What people and their tools see: logs, metrics, the live table. Nothing here decides anything."""

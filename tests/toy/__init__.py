"""The second codec: it exists to keep the codec contract honest and is never shipped."""

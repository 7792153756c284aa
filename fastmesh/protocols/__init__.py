"""Protocols as they are spoken, above the bytes: words, grammars, limits."""

"""Measuring fastmesh: side by side with its peers, against its own past, and in the small. See
perf/README.md.
"""

"""Which build this is: with fault points, for tests, or without, for everybody else."""

FAULT_POINTS: bool
"""True in builds with FASTMESH_TESTS=1 or FASTMESH_DEBUG=1, never in a wheel: only then is
FASTMESH_FAULT read (handover/faults.py)."""

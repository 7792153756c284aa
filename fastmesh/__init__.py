"""A message mesh: one process beside every application that carries its message and RPC traffic."""

from fastmesh._version import __version__

__all__ = ["__version__"]

"""Bolt clients and services for tests, honest and hostile, on asyncio and tests/reference/bolt.py.

`client` asks and checks, `server` answers or misbehaves (in process, or as a process of its own
that can be killed), `canary` is the blameless neighbour of every fault. None of them knows
fastmesh: they run against each other directly first, and then through the mesh.
"""

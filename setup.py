"""The extension list: one line per module of the fast path. Everything else is in pyproject.toml.

Switches, all from the environment:
  FASTMESH_DEBUG=1     assertions (FM_DEBUG), bounds checks and fault points compiled in
  FASTMESH_TESTS=1     what only a checkout has: the toy codec, and fault points at full speed
  FASTMESH_ASAN=1      address and undefined-behaviour sanitizers (see `make asan`)
  FASTMESH_ANNOTATE=1  an HTML page per module that shows where Python is still touched
  FASTMESH_ONLY=a,b    build these modules only
"""

import os

from Cython.Build import cythonize
from setuptools import Extension, setup

DEBUG = os.environ.get("FASTMESH_DEBUG") == "1"
TESTS = os.environ.get("FASTMESH_TESTS") == "1"
ASAN = os.environ.get("FASTMESH_ASAN") == "1"
ANNOTATE = os.environ.get("FASTMESH_ANNOTATE") == "1"
ONLY = set(filter(None, os.environ.get("FASTMESH_ONLY", "").split(",")))

MODULES = [
    "points",  # whether this build has fault points
    "crc32",  # IEEE CRC-32 and its linear delta
    "bolt",  # SOFA Bolt frames
    "push",  # what the message mesh reads of Bolt frames: needs bolt's functions, nothing needs it
    "timers",  # the timer wheel
    "slots",  # upstream request ids
    "counters",  # rows, histograms and their consistent copy
    "ring",  # one producer, one consumer, between Python and an engine thread
    "schedule",  # which node of an application takes a delivery
    "route",  # the compiled snapshot
    "groups",  # push groups: members, credit, keys, which node
    "conn",  # connections as bytes: read area, write queues, memory
    "pool",  # upstream connections and endpoint health
    "relay",  # frames: route, slot, patch, queue, answer
    "handover",  # a world in a file, and out of it in another process
    "engine",  # the thread, and what Python drives
    "load",  # load generator and echo service
]
TEST_MODULES = ["toy"]  # the second codec that keeps the contract honest; never shipped

CFLAGS = ["-O2", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Wno-unused-parameter"]
LDFLAGS: list[str] = []
if DEBUG or ASAN:
    CFLAGS += ["-O1", "-g", "-DFM_DEBUG=1", "-fno-omit-frame-pointer"]
if ASAN:
    CFLAGS += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    LDFLAGS += ["-fsanitize=address,undefined"]


def extension(package: str, folder: str, name: str) -> Extension:
    return Extension(
        f"{package}.{name}",
        [f"{folder}/{name}.pyx"],
        include_dirs=["fastmesh/_ext"],
        # For one module alone: in any other it would be a build that nobody ships.
        extra_compile_args=[*CFLAGS, "-DFM_FAULTS=1"] if TESTS and name == "points" else CFLAGS,
        extra_link_args=LDFLAGS,
    )


def extensions() -> list[Extension]:
    found = [extension("fastmesh._ext", "fastmesh/_ext", name) for name in MODULES]
    # The toy is built only in a checkout: an sdist or a wheel carries no tests.
    found += [extension("tests.toy", "tests/toy", name) for name in TEST_MODULES if TESTS]
    return [e for e in found if not ONLY or e.name.rpartition(".")[2] in ONLY]


setup(
    ext_modules=cythonize(
        extensions(),
        annotate=ANNOTATE,
        nthreads=2,
        compiler_directives={
            "language_level": 3,
            "boundscheck": DEBUG,
            "wraparound": False,
            "cdivision": True,
            "initializedcheck": False,
            "nonecheck": False,
            "embedsignature": True,
            "freethreading_compatible": False,
        },
    )
)

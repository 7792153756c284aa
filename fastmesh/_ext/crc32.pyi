"""The face of the checksum for tests and benchmarks; codecs call the functions of crc32.pxd."""

def crc32(data: bytes, crc: int = 0) -> int:
    """zlib's crc32, over a copy in an allocation of exactly that size."""

def patch(crc: int, old: int, new: int, following: int) -> int:
    """The checksum after the word before `following` bytes changed from `old` to `new`."""

def use_wide(on: bool) -> bool:
    """Choose carry-less multiplication (the default where there is one) or the portable way.

    For tests, which compare both. True if the wide way is now in use.
    """

def bench_crc32(data: bytes, rounds: int) -> float:
    """Nanoseconds per pass over `data`."""

def bench_patch(following: int, rounds: int) -> float:
    """Nanoseconds per patched checksum."""

"""Fuzz targets, one per parser: `python -m tests.fuzz.fuzz_<protocol> --seconds 60`."""

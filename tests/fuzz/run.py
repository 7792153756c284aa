"""Runs one fuzz target for some seconds: on atheris where it is installed, else on our mutator."""

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.fuzz.mutate import CORPUS, corpus, mutants

BATCH = 5000  # inputs between two looks at the clock


def main(
    protocol: str,
    target: Callable[[bytes], None],
    repair: Callable[[bytes], bytes] | None = None,
    argv: list[str] | None = None,
) -> int:
    """0 when nothing was found; else the input is kept and the command to repeat it printed."""
    parser = argparse.ArgumentParser(description=f"Fuzz the {protocol} codec.")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, help="of our own mutator; drawn if absent")
    parser.add_argument("--replay", type=Path, help="run this one input and end")
    parser.add_argument("--own", action="store_true", help="our own mutator, even with atheris")
    options = parser.parse_args(argv)
    if options.replay is not None:
        target(options.replay.read_bytes())
        return 0
    if importlib.util.find_spec("atheris") is not None and not options.own:
        return _atheris(protocol, target, options.seconds)

    seed = options.seed if options.seed is not None else time.monotonic_ns() & 0xFFFFFFFF
    seeds = list(corpus(protocol).values())
    ends = time.monotonic() + options.seconds
    done = 0
    print(f"{protocol}: seed {seed}, {len(seeds)} corpus files, {options.seconds:g} s")
    while time.monotonic() < ends:
        for data in mutants(seeds, seed + done, BATCH, repair):
            try:
                target(data)
            except Exception:
                kept = Path(f"crash-{protocol}-{seed + done}.bin")
                kept.write_bytes(data)
                print(f"found: {data.hex()}")
                print(f"again: python -m tests.fuzz.fuzz_{protocol} --replay {kept}")
                raise
        done += BATCH
    print(f"{protocol}: {done} inputs, nothing found")
    return 0


def _atheris(protocol: str, target: Callable[[bytes], None], seconds: float) -> int:
    import atheris  # type: ignore[import-not-found]

    arguments = [sys.argv[0], f"-max_total_time={int(seconds)}", str(CORPUS / protocol)]
    atheris.Setup(arguments, target)
    atheris.Fuzz()
    return 0

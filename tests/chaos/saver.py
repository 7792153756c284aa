"""One save in a process of its own, for tests that kill it or break its system calls.

    python saver.py DIRECTORY PAYLOAD_FILE [FILE_SIZE_LIMIT]

What lies between access("BEGIN") and access("END") is the save. Ends with the errno of the save, 0
when it worked: by then no other way out may be left. Nothing from site-packages is needed: `python
-S` starts sooner.
"""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

ROOT = str(Path(__file__).parent.parent.parent)
NAME = "registrations"
MOST = 1 << 20


def main() -> int:
    sys.path.insert(0, ROOT)
    from fastmesh.control.state_dir import StateDir
    from fastmesh.mesh.persist import GenerationStore

    payload = Path(sys.argv[2]).read_bytes()
    store = GenerationStore(StateDir(sys.argv[1]), NAME, MOST)
    store.load(bytes)
    if len(sys.argv) > 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
    failed = 0
    os.access("BEGIN", os.F_OK)
    try:
        store.save(payload)
    except OSError as error:
        failed = error.errno or 255
    os.access("END", os.F_OK)
    return failed


if __name__ == "__main__":
    os._exit(main())  # nothing of the interpreter's end belongs to the save

"""The fast path: everything that happens per byte, per frame, per wake-up.

Rules of this folder:

* Nothing here imports anything of fastmesh but `errors`.
* Engine threads run with the GIL released for life: no Python object is created, touched or
  reference-counted per frame, and no lock is shared between threads.
* A length is checked against what remains *and* against a limit before a byte is allocated for it.
* Codecs touch no socket, no clock, no log and no policy: bytes and times come in as arguments.
* `.pxd` files are the contracts and are read first; `.pyi` files show the face that Python sees.
"""

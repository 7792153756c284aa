"""Slow, obvious twins of the native codecs: what every native parser is compared with.

They are written from the protocol's field tables and share no code with `fastmesh`, so that one
misunderstanding has to be made twice before a test agrees with it.
"""

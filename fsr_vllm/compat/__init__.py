"""The only rooms that know names vLLM does not promise to keep: one small file per surface.

Each name has a record beside the code that uses it (`patching.Entry`, or `Patch` where it is
replaced): why it is needed, in which versions it was read or run, when it can go. `tests/compat`
fails when one of them moves. Supported window: see `dependencies` in pyproject.toml.
"""

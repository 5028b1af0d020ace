"""The only rooms that know names vLLM does not promise to keep: one small file per surface.

Each entry says why it is needed, in which versions it was read or run, and when it can go.
`tests/compat` fails when one of them moves. Supported window: see `dependencies` in pyproject.toml.
"""

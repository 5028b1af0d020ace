"""The greedy loops that pruning methods share, each over one similarity matrix per image.

`farthest_from_prefix`, `dpp_greedy` and `coverage_greedy` pick an implementation by device; see
`dispatch.py` for what they promise.
"""

from .dispatch import backend_for, coverage_greedy, dpp_greedy, farthest_from_prefix

__all__ = ["backend_for", "coverage_greedy", "dpp_greedy", "farthest_from_prefix"]

"""Measurements of the package, with their committed results in results/. Run from the repository's
root with -m.
"""

"""Checks and benchmarks that run from a checkout: `python -m tools.NAME`. No part of the package."""

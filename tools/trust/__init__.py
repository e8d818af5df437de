"""Campaigns that try to make a store lose, forge or remember something: kills, power cuts, flips, fuzz, crowds.

Each campaign is one file with `run(...) -> Outcome`. `python -m tools.soak` runs them all and prints the table.
"""

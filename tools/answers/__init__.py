"""The parts of the answer benchmark: recordings, rows, asking, scores, plots. `python -m tools.bench_answers`."""

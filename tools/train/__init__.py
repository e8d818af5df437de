"""Training of the embedded model on the world, from scratch: `python -m tools.train.run`."""

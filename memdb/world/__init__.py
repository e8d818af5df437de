"""A world with known answers: recordings of moving things, planned from a seed, rendered, and asked about."""

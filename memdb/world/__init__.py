"""A world with known answers: recordings of moving things, planned from a seed, rendered, and asked about."""

MARK = "memdb-world"  # the comment in a film's container, by which it is known to be of this world

"""The bench of what reducing, retaining and indexing cost: its meter, its ground, its rows."""

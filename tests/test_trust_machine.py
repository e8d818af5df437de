"""A store under random hands, against a dictionary of what must be in it."""

"""The format version of a store. Raise it with a named migration in memdb/migrations.py, never without."""

FORMAT_VERSION = 3

"""The typed recipe of a run: schema, loading, cross-field checks."""

"""The same metagradients by other libraries and by this one, and plain training beside them: `nox -s bench`."""

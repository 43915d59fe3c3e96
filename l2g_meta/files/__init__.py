"""Files: one way to write them, locks, and reading what is not trusted."""

"""Readers of ``prepare check``: every problem of every line, not only the first."""

"""What is raised for weight files."""

from __future__ import annotations


class WeightFileError(ValueError):
    """A weight file that exists but cannot be used; the message names it and what to do."""

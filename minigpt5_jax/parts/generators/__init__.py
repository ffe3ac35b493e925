"""Generators: condition -> loss or image."""

"""Backbones, mappers and generators; each is one file that ends in its record, ``PART``."""

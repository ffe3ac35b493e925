"""Mappers: voken states -> condition."""

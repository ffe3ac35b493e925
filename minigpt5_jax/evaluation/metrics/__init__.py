"""Metrics of interleaved generation: what the papers print, and what the field prints today.

Texts and statistics are plain Python and numpy; the towers are JAX.  docs/evaluation.md says of each metric
where it comes from and what it needs.
"""

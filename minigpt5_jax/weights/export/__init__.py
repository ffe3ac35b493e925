"""Trained models as PyTorch files, one format per module; ``minigpt5_jax.export`` is the command."""

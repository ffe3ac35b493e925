"""Backbones: images and text -> hidden states."""

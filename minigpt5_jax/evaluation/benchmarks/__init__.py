"""Benchmarks of others: their prompts, their layout, their judges' answers, their scores; one file each.

Nothing of them is packaged: prompts, images and judges are the user's.
"""

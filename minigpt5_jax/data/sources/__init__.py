"""Data on disk as random-access sequences of :class:`~minigpt5_jax.data.samples.example.Example`."""

from minigpt5_jax.data.lines import TextLines
from minigpt5_jax.data.sources.base import Source
from minigpt5_jax.data.sources.cc3m import Cc3mSource
from minigpt5_jax.data.sources.columns import ColumnSource
from minigpt5_jax.data.sources.jsonl import JsonlSource
from minigpt5_jax.data.sources.mmdialog import MMDialogSource
from minigpt5_jax.data.sources.prepared import PreparedSource
from minigpt5_jax.data.sources.tar import Cc3mTarSource
from minigpt5_jax.data.sources.vist import VistSource

__all__ = [
    "Cc3mSource",
    "Cc3mTarSource",
    "ColumnSource",
    "JsonlSource",
    "MMDialogSource",
    "PreparedSource",
    "Source",
    "TextLines",
    "VistSource",
]

"""Writing data sets as ArrayRecord with TFDS; :mod:`~minigpt5_jax.data.sources.prepared` reads them.

``units`` reads one pair, story or dialogue of the raw files; ``shards`` makes the records of one shard, so
that an interrupted run loses no finished shard; ``tfds_builders`` (imported late) are the builders, with or
without Beam; ``run`` is what the command calls.
"""

"""Compiled programs are kept on disk, so that a restart is quick."""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict


def set_compile_cache(config: ConfigDict) -> None:
    """Keep compiled programs in ``config.run.compile_cache``, unless JAX was given a folder already."""
    import jax  # not needed to say what is wrong with a configuration

    if config.run.compile_cache and not jax.config.jax_compilation_cache_dir:
        folder = Path(config.run.compile_cache).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)

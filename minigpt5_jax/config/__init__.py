"""Configurations: the table of keys, what makes and varies a ConfigDict of it, and what checks one.

Run files import from here: ``get_config``, ``apply_variant``, ``choose`` and the ``use_*`` functions.
"""

from minigpt5_jax.config.errors import ConfigError, setting_errors
from minigpt5_jax.config.make import (
    PACKAGED,
    apply_variant,
    choose,
    describe,
    get_config,
    keys_of,
    num_steps,
    part_settings,
    parts_of,
    quantization_keys,
    rate_groups,
    use_inference_quantization,
    use_int8,
    use_prefix,
    use_shapes_backbones,
    use_shapes_stage2,
    use_stage2,
    value_at,
    warmup_steps,
    weight_sources,
)
from minigpt5_jax.config.profiles import PROFILES
from minigpt5_jax.config.validate import validate

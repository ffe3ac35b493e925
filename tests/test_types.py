"""Annotations of the package are checked while the tests run (``jaxtyped`` in tests/conftest.py)."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from minigpt5_jax.cli import printable
from minigpt5_jax.data.images import double
from minigpt5_jax.data.samples.pairs import PairRules
from minigpt5_jax.data.sources.kinds import PairKind
from minigpt5_jax.models.attention import attention


def test_arrays_of_other_types_or_sizes_are_refused():
    with pytest.raises(TypeCheckError, match="UInt8"):
        double(np.zeros((2, 2, 3), np.float32))
    query, key = jnp.zeros((2, 3, 1, 4)), jnp.zeros((3, 3, 1, 4))
    with pytest.raises(TypeCheckError, match="b=2"):  # one letter, two sizes
        attention(query, key, key)


def test_arrays_behind_a_name_are_checked_too():
    with pytest.raises(TypeCheckError, match="units"):
        PairKind(PairRules()).counts([], np.zeros(2), None)


def test_other_values_are_refused_too():
    with pytest.raises(TypeCheckError, match="text"):
        printable(3)

"""What is wrong with a configuration."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator


class ConfigError(ValueError):
    """A key is unknown, has a wrong type or value, or two keys do not go together."""


@contextlib.contextmanager
def setting_errors() -> Iterator[None]:
    """What the model's parts say about a setting (ValueError, a bad pattern) as a :class:`ConfigError`."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, re.error) as error:
        raise ConfigError(str(error)) from error

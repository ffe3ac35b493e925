"""Values of JSON objects, checked; every complaint names the line and the place in the object."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from minigpt5_jax.data.errors import SampleError
from minigpt5_jax.data.text import templates

MAX_LINE = 2**24  # characters of one record, far beyond what a row of the model holds


class RepeatedKeyError(Exception):
    """A JSON object names a key twice, of which Python would keep the last without a word."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, as ``object_pairs_hook`` of the json module; RepeatedKeyError for a key given twice."""
    value: dict[str, Any] = {}
    for key, content in pairs:
        if key in value:
            raise RepeatedKeyError(f"key {key!r} occurs twice in one object")
        value[key] = content
    return value


class Fields:
    """Checks the values of one object.

    Args:
      where: the object, as a user finds it again (``own.jsonl:7``).

    Every method raises SampleError, naming ``where``, the place in the object and what was found.
    """

    def __init__(self, where: str):
        self.where = where

    def fail(self, place: str, problem: str) -> SampleError:
        return SampleError(self.where, f"{place}: {problem}" if place else problem)

    def json(self, line: str, *, unique: bool = False) -> Any:
        """What a line of JSON holds; ``unique`` refuses keys given twice, of which Python keeps the last."""
        if len(line) > MAX_LINE:
            raise self.fail("", f"a line of {len(line):,} characters; one record has at most {MAX_LINE:,}")
        try:
            return json.loads(line, object_pairs_hook=unique_keys if unique else None)
        except RepeatedKeyError as error:
            raise self.fail("", str(error)) from None
        except json.JSONDecodeError as error:
            raise self.fail("", f"no valid JSON ({error}); is the line cut off?") from None
        except ValueError:  # Python reads integers of 4,300 digits at most
            raise self.fail("", "no valid JSON (a number with too many digits)") from None
        except RecursionError:
            raise self.fail("", "no valid JSON (nested too deeply)") from None

    def object(
        self, value: Any, place: str, required: Sequence[str], optional: Sequence[str] | None = ()
    ) -> dict:
        """An object with these keys; ``optional=None`` allows any others."""
        if not isinstance(value, dict):
            raise self.fail(place, f"expected an object, found {type(value).__name__}")
        known = (*required, *(optional or ()))
        missing = [key for key in required if key not in value]
        unknown = [key for key in value if key not in known and optional is not None]
        if missing or unknown:
            parts = [f"lacks {', '.join(missing)}"] * bool(missing)
            parts += [f"has unknown keys {', '.join(unknown)}"] * bool(unknown)
            raise self.fail(place, f"{' and '.join(parts)} (known: {', '.join(known)})")
        return value

    def items(self, value: Any, place: str) -> list:
        if not isinstance(value, list):
            raise self.fail(place, f"expected a list, found {type(value).__name__}")
        return value

    def string(self, value: Any, place: str) -> str:
        if not isinstance(value, str):
            raise self.fail(place, f"expected text, found {type(value).__name__}")
        try:
            value.encode()
        except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, tokenizers refuse it
            raise self.fail(place, f"text is no Unicode at character {error.start}") from None
        return value

    def integer(self, value: Any, place: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.fail(place, f"expected a whole number, found {type(value).__name__}")
        return value

    def plain(self, value: Any, place: str) -> str:
        """Text, as it is written, that does not spell a token of ours; it may be empty."""
        text = self.string(value, place)
        special = templates.find_special(text) or (templates.END if templates.END in text else None)
        if special:
            raise self.fail(place, f"text contains {special}, which has a meaning of its own in prompts")
        return text

    def words(self, value: Any, place: str) -> str:
        """Text that is not empty and does not spell a token of ours, white space around it dropped."""
        text = self.string(value, place).strip()
        if not text:
            raise self.fail(place, "text is empty")
        return self.plain(text, place)

    def path(self, value: Any, place: str) -> str:
        path = self.string(value, place)
        if not path.strip():
            raise self.fail(place, "path of an image is empty")
        if "\0" in path:
            raise self.fail(place, "path of an image contains a null character")
        return path

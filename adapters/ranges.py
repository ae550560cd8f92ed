"""Requires numbers that a file declares to be numbers, and within bounds.

Must not know: what they mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from motet.adapters.errors import ConfigError


class Range(NamedTuple):
    """What a number may be: its type (`object` is any), smallest and largest value, and whether it may be null."""

    kind: Any
    low: float
    high: float
    optional: bool = False


def require_numbers(place: str, holder: object, ranges: Mapping[str, Range]) -> None:
    """Check the attributes of these names.

    Args:
        place: of the file and the object in it, for messages.

    Raises:
        ConfigError: one is no number, or beyond its bounds; NaN is within none.
    """
    for name, (kind, low, high, optional) in ranges.items():
        value = getattr(holder, name)
        if value is None and optional:
            continue
        fits = isinstance(value, int | float) and not isinstance(value, bool) and isinstance(value, kind)
        if not fits or not low <= value <= high:
            what = "a whole number" if kind is int else "a number"
            raise ConfigError(f"{place}: {name} {value!r} is not {what} from {low:g} to {high:g}")

"""Checks single values of a configuration: each function returns the typed value or raises ConfigError.

Must not know: which keys exist, what they mean.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from motet.adapters.errors import ConfigError

Value = TypeVar("Value")

LONGEST_PATTERN = 2_000
"""Characters of a regular expression that is accepted from a config."""
MOST_PATTERNS = 4_096
"""Of one key: one for each layer of a large base."""

WHOLE_PATH = "{}"
PATH_ENDING = r"(.*\.)?({})$"
NUMBERED_LAYER = r"(?:^|.*?\.){}\.(?P<idx>\d+)\."
"""What PEFT puts around a pattern before it matches module paths with it."""


def boolean(config: Mapping[str, Any], key: str) -> bool:
    """True or false; absent and null are false."""
    value = config.get(key) or False
    if not isinstance(value, bool):
        raise ConfigError(f"{key}={value!r} is not true or false")
    return value


def positive_int(key: str, value: object) -> int:
    """A whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{key}={value!r} is not a whole number of at least 1")
    return value


def number(key: str, value: object) -> float:
    """A finite number."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e9:
        raise ConfigError(f"{key}={value!r} is not a finite number")
    return float(value)


def one_of(key: str, value: object, allowed: tuple[str, ...]) -> str:
    """One of the allowed words."""
    if not isinstance(value, str) or value not in allowed:
        raise ConfigError(f"{key}={value!r} is none of {', '.join(allowed)}")
    return value


def modules(key: str, value: object) -> str | tuple[str, ...]:
    """A regular expression for whole paths, or path endings."""
    if isinstance(value, str):
        return regular_expression(key, value, WHOLE_PATH)
    if isinstance(value, list | tuple) and all(isinstance(name, str) for name in value):
        return tuple(value)
    raise ConfigError(f"{key}={value!r} is neither a regular expression nor a list of module names")


def names(key: str, value: object) -> tuple[str, ...]:
    """A list of names."""
    if isinstance(value, list | tuple) and all(isinstance(name, str) and name for name in value):
        return tuple(value)
    raise ConfigError(f"{key}={value!r} is not a list of module names")


def patterns(key: str, value: object) -> tuple[str, ...]:
    """Regular expressions of layer lists; one alone may stand without a list."""
    patterns = (value,) if isinstance(value, str) else value
    if not isinstance(patterns, list | tuple) or len(patterns) > MOST_PATTERNS:
        raise ConfigError(f"{key} is not a list of up to {MOST_PATTERNS:,} regular expressions")
    return tuple(regular_expression(key, pattern, NUMBERED_LAYER) for pattern in patterns)


def layer_numbers(value: object) -> frozenset[int] | None:
    """Layer numbers; None where nothing restricts them."""
    if value is None or value == []:
        return None
    layers = [value] if isinstance(value, int) else value
    if not isinstance(layers, list) or not all(isinstance(layer, int) for layer in layers):
        raise ConfigError(f"layers_to_transform={value!r} is not a list of layer numbers")
    return frozenset(layers)


def pattern_table(
    key: str, value: object, check: Callable[[str, object], Value]
) -> tuple[tuple[re.Pattern[str], Value], ...]:
    """(regular expression that matches a path with the ending, checked value) in the order written."""
    if not isinstance(value, dict):
        raise ConfigError(f"{key}={value!r} is not an object of pattern: value")
    if len(value) > MOST_PATTERNS:
        raise ConfigError(f"{key} has {len(value):,} patterns, more than {MOST_PATTERNS:,}; is it an adapter?")
    table = ((regular_expression(key, pattern, PATH_ENDING), pattern, item) for pattern, item in value.items())
    return tuple(
        (re.compile(PATH_ENDING.format(checked)), check(f"{key}[{pattern!r}]", item))
        for checked, pattern, item in table
    )


def token_table(key: str, value: object) -> dict[str | None, tuple[int, ...]]:
    """Ending of a module's path → distinct token ids; a list alone stands under None, for the input embedding."""
    table: dict[Any, Any] = value if isinstance(value, dict) else {None: value} if value else {}
    for module, tokens in table.items():
        if not isinstance(tokens, list) or not tokens or not all(type(one) is int and one >= 0 for one in tokens):
            raise ConfigError(f"{key}[{module!r}] is no list of token ids, or an empty one")
        if len(set(tokens)) != len(tokens):
            raise ConfigError(f"{key}[{module!r}] names a token twice; which of its two rows counts cannot be told")
    return {module: tuple(tokens) for module, tokens in table.items()}


def regular_expression(key: str, value: object, around: str) -> str:
    """The pattern itself, once it compiles alone and in its place."""
    if not isinstance(value, str) or len(value) > LONGEST_PATTERN:
        raise ConfigError(f"{key} has a pattern that is not a string of at most {LONGEST_PATTERN} characters")
    try:
        re.compile(value)
        re.compile(around.format(value))
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(f"{key} has an invalid regular expression {value!r}: {error}") from error
    return value
